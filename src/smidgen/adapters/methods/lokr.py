"""LoKr: the Kronecker product of two small matrices (https://arxiv.org/abs/2309.14859).

Legend: the weight is a matrix (out, in), R the rank, s the scaling; out = a b and in = c d.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from smidgen.adapters.lycoris import Lycoris, LycorisConfig, unfold_core
from smidgen.adapters.targeted import uniform


@dataclass(kw_only=True)
class LoKrConfig(LycorisConfig):
    """The configuration of LoKr. Names and meanings are those of Hugging Face adapter files.

    Args:
        decompose_both: the first, smaller matrix is a product of two factors too, where that saves numbers.
        decompose_factor: a and c are this number where it divides the side, or the next smaller divisor; -1: the
            divisor nearest to the square root.
        rank_dropout_scale: rows that are not dropped make up for those that are.
        init_weights: True starts with a first matrix of zeros, "lycoris" with a second one of zeros, False at random.
    """

    peft_type: ClassVar[str] = "LOKR"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True  # pyright: ignore[reportIncompatibleVariableOverride]

    def problems(self) -> list[str]:
        lines = super().problems()
        if not (self.decompose_factor == -1 or self.decompose_factor > 0):
            lines.append(f"decompose_factor: must be -1 or a whole number from 1, got {self.decompose_factor}")
        if self.init_weights not in (True, False, "lycoris"):
            lines.append(f"init_weights: must be true, false or 'lycoris', got {self.init_weights!r}")
        return lines


class LoKr(Lycoris):
    """W + s w1 (x) w2 with w1 (a, c) and w2 (b, d), each whole or a product of two factors of rank R."""

    config_class = LoKrConfig

    lokr_w1: Any
    lokr_w2: Any

    def build(self, out: int, channels: int, config: LoKrConfig) -> None:
        r, new = config.r, dict(device=self.device)
        self.rescales_rows = config.rank_dropout_scale
        (a, b), (c, d) = _sides(out, config.decompose_factor), _sides(channels, config.decompose_factor)
        if config.decompose_both and r < max(a, c) / 2:
            self.lokr_w1_a, self.lokr_w1_b = uniform(a, r, **new), uniform(r, c, **new)
        else:
            self.lokr_w1 = uniform(a, c, **new)
        if r >= max(b, d) / 2:
            self.keeps_kernel = False
            self.lokr_w2 = uniform(b, d, *self.kernel, **new)
        elif self.keeps_kernel:
            self.lokr_t2 = uniform(*self.core, **new)
            self.lokr_w2_a, self.lokr_w2_b = uniform(r, b, **new), uniform(r, d, **new)
        else:
            self.lokr_w2_a, self.lokr_w2_b = uniform(b, r, **new), uniform(r, d * math.prod(self.kernel), **new)
        if config.init_weights:
            whole, factor = ("lokr_w2", "lokr_w2_b") if config.init_weights == "lycoris" else ("lokr_w1", "lokr_w1_a")
            nn.init.zeros_(self.get_parameter(whole if whole in self._parameters else factor))

    def product(self) -> Tensor:
        first = self.lokr_w1 if "lokr_w1" in self._parameters else self.lokr_w1_a @ self.lokr_w1_b
        if "lokr_w2" in self._parameters:
            second = self.lokr_w2
        elif self.keeps_kernel:
            second = unfold_core(self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        else:
            second = self.lokr_w2_a @ self.lokr_w2_b
        if second.dim() > 3:  # files of one-dimensional kernels mean the product without this
            first = first.reshape(first.shape + (1,) * (second.dim() - 2))
        return _kronecker(first, second)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product over all dimensions, a missing first one being 1. (``torch.kron`` refuses some kernels.)"""
    sizes = (1,) * (second.dim() - first.dim()) + first.shape
    first = first.reshape([side for size in sizes for side in (size, 1)])
    second = second.reshape([side for size in second.shape for side in (1, size)])
    return (first * second).reshape([a * b for a, b in zip(first.shape[::2], second.shape[1::2], strict=True)])


def _sides(width: int, factor: int) -> tuple[int, int]:
    """Two numbers whose product is `width`: see `LoKrConfig.decompose_factor`."""
    if factor > 0 and width % factor == 0:
        return factor, width // factor
    most = math.isqrt(width) if factor < 0 else min(factor, math.isqrt(width))
    first = next(number for number in range(most, 0, -1) if width % number == 0)
    return first, width // first
