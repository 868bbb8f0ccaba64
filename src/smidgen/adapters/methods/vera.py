"""VeRA: two vectors for each layer scale random matrices that all layers share (https://arxiv.org/abs/2310.11454).

Legend: the weight is a matrix (out, in), R the rank.
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
class VeraConfig(SharedConfig):
    """The configuration of VeRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the rank; higher than LoRA's, as a rank costs one number a layer.
        vera_dropout: share of the inputs of the update that is dropped in training.
        d_initial: where the vector inside starts.
    """

    peft_type: ClassVar[str] = "VERA"

    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1

    def problems(self) -> list[str]:
        return super().problems() + whole_number("r", self.r) + fraction("vera_dropout", self.vera_dropout)


class Vera(OverShared):
    """W + diag(lambda_b) B diag(lambda_d) A: the vectors are trained, A (R, in) and B (out, R) are fixed and shared."""

    config_class = VeraConfig

    @classmethod
    def draw(cls, config: VeraConfig, outputs: int, inputs: int, generator: torch.Generator) -> dict[str, Tensor]:
        matrices = {"vera_A": torch.empty(config.r, inputs), "vera_B": torch.empty(outputs, config.r)}
        for matrix in matrices.values():
            bound = math.sqrt(6 / matrix.shape[1])
            matrix.uniform_(-bound, bound, generator=generator)
        return matrices

    def __init__(self, base: Any, config: VeraConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.dropout = nn.Dropout(config.vera_dropout)
        out, device = self.layer.shape[0], device_of(base)
        if config.init_weights:
            self.vera_lambda_b = nn.Parameter(torch.zeros(out, device=device))
            self.vera_lambda_d = nn.Parameter(torch.full((config.r,), config.d_initial, device=device))
        else:
            self.vera_lambda_b = nn.Parameter(torch.ones(out, device=device))
            self.vera_lambda_d = nn.Parameter(torch.randn(config.r, device=device))

    def factors(self) -> tuple[Tensor, Tensor]:
        out, inputs = self.layer.shape
        a, b = (matrix.to(self.vera_lambda_d.device) for matrix in (self.shared.vera_A, self.shared.vera_B))
        return self.vera_lambda_d[:, None] * a[:, :inputs], self.vera_lambda_b[:, None] * b[:out]
