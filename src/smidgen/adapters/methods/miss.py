"""MiSS: groups of inputs share one block of the update (https://arxiv.org/abs/2409.15371).

Legend: the weight is a matrix (out, in), R the width of a group of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.adapters.base import Inner
from smidgen.adapters.config import WeightConfig, fraction, whole_number
from smidgen.adapters.targeted import Additive, device_of, uniform
from smidgen.errors import TargetError


@dataclass(kw_only=True)
class MissConfig(WeightConfig):
    """The configuration of MiSS. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the width of a group of inputs.
        miss_dropout: share of the inputs of the update that is dropped in training; not with "bat".
        mini_r: with "mini", how many outputs have a block of their own; they are repeated for the others.
        init_weights: True, or a variant: "bat", whose update depends on the weight, or "mini", whose block is smaller.
            False is a random start.
    """

    peft_type: ClassVar[str] = "MISS"
    beyond_format: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out"})

    r: int = 64
    miss_dropout: float = 0.0
    mini_r: int = 1
    init_weights: bool | Literal["bat", "mini"] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    def problems(self) -> list[str]:
        lines = super().problems() + whole_number("r", self.r) + fraction("miss_dropout", self.miss_dropout)
        if self.init_weights not in (True, False, "bat", "mini"):
            lines.append(f"init_weights: must be true, false, 'bat' or 'mini', got {self.init_weights!r}")
        return lines + whole_number("mini_r", self.mini_r)


class MiSS(Additive):
    """W + M, whose columns repeat every R inputs: `miss_block` (R, out). Bat: every block of W becomes W + W M + M."""

    config_class = MissConfig
    latency = "small"

    def __init__(self, base: Any, config: MissConfig, shared: Any = None):
        super().__init__(base, config, shared)
        (out, inputs), r = self.layer.shape, config.r
        self.r, self.variant, self.dropout = r, config.init_weights, nn.Dropout(config.miss_dropout)
        shape = {"bat": (out // r, r, r), "mini": (r, config.mini_r)}.get(str(self.variant), (r, out))
        if r > inputs:
            raise TargetError(f"r: {r} is more than the layer's {inputs} inputs")
        if self.variant == "bat" and (inputs % r or out % r):
            raise TargetError(f"r: with init_weights 'bat' it must divide the sides {out} and {inputs}, got {r}")
        if self.variant == "mini" and out % config.mini_r:
            raise TargetError(f"mini_r: must divide the layer's {out} outputs, got {config.mini_r}")
        self.miss_block = nn.Parameter(torch.zeros(shape, device=device_of(base)))
        if not self.variant:
            self.miss_block = uniform(r, out, device=device_of(base))

    def _block(self) -> Tensor:
        """The block of every group, (R, out)."""
        return self.miss_block.repeat(1, self.layer.shape[0] // self.miss_block.shape[1])

    def delta(self) -> Tensor:
        inputs = self.layer.shape[1]
        return self._block().T.repeat(1, -(-inputs // self.r))[:, :inputs]

    def _bat(self, matrix: Tensor) -> Tensor:
        """What Bat adds to `matrix` (out, in): W M + M for each of its blocks W (R, R)."""
        block = self.miss_block.to(matrix.dtype)
        blocks = matrix.unflatten(0, (-1, self.r)).unflatten(2, (-1, self.r)).permute(2, 0, 1, 3)
        return (blocks @ block + block).permute(1, 2, 0, 3).reshape(matrix.shape)

    def changed(self, matrix: Tensor) -> Tensor:
        return matrix + self._bat(matrix) if self.variant == "bat" else super().changed(matrix)

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = self.below(inner, x)
        if self.variant == "bat":
            return y + self.layer.linear(x.to(y.dtype), self._bat(self.layer.matrix(inner.weight)))
        x = F.pad(self.dropout(x.to(y.dtype)), (0, -x.shape[-1] % self.r))
        return y + x.unflatten(-1, (-1, self.r)).sum(-2) @ self._block().to(y.dtype)
