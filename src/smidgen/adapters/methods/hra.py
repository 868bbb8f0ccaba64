"""HRA: the weight times a chain of Householder reflections (https://arxiv.org/abs/2405.17484).

Legend: the weight is a matrix (out, in), R the number of reflections, U (in, R) their directions.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import WeightConfig, whole_number
from smidgen.adapters.layers import ConvLayer, LinearLayer
from smidgen.adapters.targeted import Rotation, device_of, uniform
from smidgen.errors import TargetError


@dataclass(kw_only=True)
class HRAConfig(WeightConfig):
    """The configuration of HRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the number of reflections. The start is the base model where it is even: each pair undoes itself.
        apply_GS: make the directions orthogonal first. Such a chain is never the identity.
    """

    peft_type: ClassVar[str] = "HRA"
    beyond_format: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out"})

    r: int = 8
    apply_GS: bool = False

    def problems(self) -> list[str]:
        return super().problems() + whole_number("r", self.r)


class HRA(Rotation):
    """W H_1 H_2 ... H_R with H_i = I - 2 u_i u_i^T: `hra_u` (in, R) is trained, of any length."""

    config_class = HRAConfig
    kinds = (LinearLayer, ConvLayer)

    def __init__(self, base: Any, config: HRAConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.apply_GS, width = config.apply_GS, self.layer.shape[1]
        if config.apply_GS and config.r > width:
            raise TargetError(f"r: {config.r} directions cannot be orthogonal among {width} inputs")
        pairs = config.init_weights and not config.r % 2 and not config.apply_GS
        if config.init_weights and not pairs and not config.inference_mode:
            warnings.warn("HRA starts as the base model only with an even r and without apply_GS", stacklevel=2)
        start = uniform(width, config.r // 2 if pairs else config.r, device=device_of(base))
        self.hra_u = nn.Parameter(start.detach().repeat_interleave(2, dim=1)) if pairs else start

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        """The chain is I - U T U^T with a small upper triangular T (R, R); nothing as wide as the weight is made."""
        if self.apply_GS:
            u, _ = torch.linalg.qr(self.hra_u)
            return x - 2 * (x @ u.to(x.dtype)) @ u.T.to(x.dtype)
        u = self.hra_u / self.hra_u.norm(dim=0)
        half = torch.eye(u.shape[1], device=u.device, dtype=u.dtype) / 2
        inverse = (u.T @ u).triu(1) + half
        right = torch.linalg.solve_triangular(inverse if back else inverse.T, u.T, upper=back)
        return x - (x @ u.to(x.dtype)) @ right.to(x.dtype)
