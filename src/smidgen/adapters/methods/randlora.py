"""RandLoRA: a full-rank update from random matrices that all layers share (https://arxiv.org/abs/2502.00987).

Legend: the weight is a matrix (out, in), R the rank of a base, n the number of bases, small and large the sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import fraction, whole_number
from smidgen.adapters.shared import OverShared, SharedConfig
from smidgen.adapters.targeted import device_of


@dataclass(kw_only=True)
class RandLoraConfig(SharedConfig):
    """The configuration of RandLoRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the rank of each base; their number makes the update of full rank, so a smaller r trains more.
        randlora_alpha: the update is scaled by randlora_alpha / r.
        randlora_dropout: share of the inputs of the update that is dropped in training.
        sparse: shared matrices of -1, 0 and 1, one entry in three not zero.
        very_sparse: likewise, one entry in sqrt(small) not zero.
    """

    peft_type: ClassVar[str] = "RANDLORA"

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    sparse: bool = False
    very_sparse: bool = False

    def problems(self) -> list[str]:
        return super().problems() + whole_number("r", self.r) + fraction("randlora_dropout", self.randlora_dropout)


class RandLora(OverShared):
    """W + s sum_n B_n diag(lambda_n) A diag(gamma_n): `randlora_lambda` (R, n), `randlora_gamma` (n, small)."""

    config_class = RandLoraConfig

    @classmethod
    def draw(cls, config: RandLoraConfig, outputs: int, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        small, large = sorted((outputs, inputs))
        number = math.ceil(small / config.r)
        if config.sparse or config.very_sparse:
            few = 1 / (2 * (math.sqrt(small) if config.very_sparse else 3))
            shapes = ((config.r, 1, small), (large, number, config.r))
            a, b = (torch.rand(shape, generator=generator) for shape in shapes)
            a, b = ((drawn > 1 - few).float() - (drawn < few).float() for drawn in (a, b))
        else:
            # Drawn in 16 bits, as the reference does: its seeds give other numbers in 32.
            a = _uniform((config.r, 1, small), generator)
            b = torch.cat([_uniform((large, 1, config.r), generator) for _ in range(number)], dim=1)
        return {"randlora_A": (a / a.std()).float(), "randlora_B": (b / b.std()).float()}

    def __init__(self, base: Any, config: RandLoraConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.dropout, self.scaling = nn.Dropout(config.randlora_dropout), config.randlora_alpha / config.r
        small, large, device = *sorted(self.layer.shape), device_of(base)
        self.number = math.ceil(small / config.r)
        start, width = (torch.zeros, max(self.number, small)) if config.init_weights else (torch.randn, large)
        self.randlora_lambda = nn.Parameter(start(config.r, self.number, device=device))
        self.randlora_gamma = nn.Parameter(torch.full((self.number, small), 1 / width, device=device))

    def factors(self) -> tuple[Tensor, Tensor]:
        small, large = sorted(self.layer.shape)
        device = self.randlora_lambda.device
        a = self.shared.randlora_A[..., :small].to(device)
        b = self.shared.randlora_B[:large, : self.number].to(device).flatten(1)
        scaled = (self.randlora_lambda[:, :, None] * a * self.randlora_gamma).flatten(0, 1)
        narrow = self.layer.shape[1] == small
        return (self.scaling * scaled, b) if narrow else (b.T, self.scaling * scaled.T)

    def repeated(self, path: str) -> dict[str, str]:
        """Other tools' files hold the shared matrices once more for each layer."""
        return {f"base_model.model.{path}.{name}": f"base_model.{name}" for name in ("randlora_A", "randlora_B")}


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)
