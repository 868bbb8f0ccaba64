"""What LoHa and LoKr share: an update from small factors, dropped whole or by rows, for layers and kernels alike.

Source: LyCORIS, https://arxiv.org/abs/2309.14859.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from smidgen.adapters.config import WeightConfig, fraction
from smidgen.adapters.layers import ConvLayer, LinearLayer
from smidgen.adapters.targeted import Additive, device_of


@dataclass(kw_only=True)
class LycorisConfig(WeightConfig):
    """What the configurations of LoHa and LoKr share.

    Args:
        r: the rank of the factors.
        alpha: the update is scaled by alpha / r.
        rank_pattern: another rank for modules whose path ends with a regular expression.
        alpha_pattern: another alpha likewise.
        rank_dropout: share of the rows of the update that is dropped in training.
        module_dropout: share of training steps in which the whole update of a layer is dropped.
        use_effective_conv2d: keep a convolution's kernel apart from its channels (FedPara, proposition 3).
    """

    beyond_format: ClassVar[frozenset[str]] = frozenset({"bias", "fan_in_fan_out"})
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False

    def problems(self) -> list[str]:
        lines = super().problems() + self.whole_numbers("r", "rank_pattern")
        return lines + fraction("rank_dropout", self.rank_dropout) + fraction("module_dropout", self.module_dropout)


class Lycoris(Additive):
    """W + s D, where D is made of small factors and s = alpha / r."""

    kinds = (LinearLayer, ConvLayer)
    rescales_rows = True  # whether rows that are not dropped make up for those that are

    def __init__(self, base: Any, config: LycorisConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.scaling = config.alpha / config.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        out, columns = self.layer.shape
        self.kernel = tuple(base.weight.shape[2:]) if isinstance(self.layer, ConvLayer) else ()
        self.keeps_kernel = config.use_effective_conv2d and any(size > 1 for size in self.kernel)
        # Files hold every kernel with at least two sides.
        self.core = (config.r, config.r, *self.kernel, *[1] * (2 - len(self.kernel)))
        self.device = device_of(base)
        self.build(out, columns // torch.Size(self.kernel).numel(), config)

    def build(self, out: int, channels: int, config: Any) -> None:
        """Make the factors for a layer of (out, channels, *kernel)."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """D, of as many numbers as the layer's weight."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        update = self.scaling * self.product().reshape(self.layer.shape)
        if self.training and self.rank_dropout:
            kept = (torch.rand(len(update), 1, device=update.device) > self.rank_dropout).to(update.dtype)
            update = update * (kept / kept.mean().clamp_min(1 / len(kept)) if self.rescales_rows else kept)
        if self.training and self.module_dropout:
            update = update * (torch.rand((), device=update.device) > self.module_dropout)
        return update


def unfold_core(core: Tensor, outputs: Tensor, channels: Tensor) -> Tensor:
    """A kernel (out, channels, *kernel) from its core (R, R, *kernel) and the factors (R, out) and (R, channels)."""
    return torch.einsum("ij...,ip,jr->pr...", core, outputs, channels)
