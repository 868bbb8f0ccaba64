"""BOFT: a rotation of all inputs from small rotations in butterfly order (https://arxiv.org/abs/2311.06243).

Legend: the weight is a matrix (out, in), n the width of a block, N the number of blocks, M the number of factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner
from smidgen.adapters.config import WeightConfig, fraction, whole_number
from smidgen.adapters.layers import ConvLayer, LinearLayer
from smidgen.adapters.targeted import Blocks, device_of
from smidgen.errors import TargetError


@dataclass(kw_only=True)
class BOFTConfig(WeightConfig):
    """The configuration of BOFT. Names and meanings are those of Hugging Face adapter files.

    Args:
        boft_block_size: the width of a block; with it boft_block_num must be 0.
        boft_block_num: the number of blocks of each layer.
        boft_n_butterfly_factor: how many factors the rotation has; 1 is OFT.
        boft_dropout: share of the blocks that are not rotated in a training step.
    """

    peft_type: ClassVar[str] = "BOFT"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0

    def problems(self) -> list[str]:
        lines = super().problems() + fraction("boft_dropout", self.boft_dropout)
        for field in ("boft_block_size", "boft_block_num"):
            lines += whole_number(field, getattr(self, field), 0)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            sizes = f"boft_block_size: {self.boft_block_size} and boft_block_num: {self.boft_block_num}"
            lines.append(f"{sizes}; one of them must be 0, the other not")
        return lines + whole_number("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1, 16)


class BOFT(Blocks):
    """diag(s) W R^T: R a product of block-diagonal rotations between permutations, s (out,) factors of the outputs."""

    config_class = BOFTConfig
    kinds = (LinearLayer, ConvLayer)

    def __init__(self, base: Any, config: BOFTConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.dropout, factors = config.boft_dropout, config.boft_n_butterfly_factor
        out, width = self.layer.shape
        size = config.boft_block_size or width // config.boft_block_num
        number = width // max(size, 1)
        if number * size != width or number == 0:
            field = "boft_block_size" if config.boft_block_size else "boft_block_num"
            raise TargetError(f"{field}: {getattr(config, field)} does not divide the {width} inputs")
        if factors > 1 and (number % 2 ** (factors - 1) or size % 2):
            raise TargetError(
                f"boft_n_butterfly_factor: {factors} needs blocks of an even width, their number a multiple of "
                f"{2 ** (factors - 1)}; there are {number} of {size}"
            )
        device, shape = device_of(base), (1, out) if isinstance(self.layer, ConvLayer) else (out, 1)
        self.boft_R = nn.Parameter(torch.zeros(factors, number, size, size, device=device))
        self.boft_s = nn.Parameter(torch.ones(shape, device=device))
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)
        orders = [_butterfly(width, number >> level, size // 2, factors) for level in range(factors)]
        self.register_buffer("order", torch.stack(orders).to(device), persistent=False)

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        levels: Any = list(zip(self._minus_identity(), self.order, strict=True))  # pyright: ignore[reportArgumentType]
        for blocks, order in levels if back else levels[::-1]:
            # P B P^T with the permutation P, whose row i has its 1 in column `order[i]`.
            x = self.turn(x[..., order.argsort()], blocks, back)[..., order]
        return x

    def _minus_identity(self) -> Tensor:
        """The rotations minus the identity, (M, N, n, n), by Cayley's map."""
        q = (self.boft_R - self.boft_R.mT) / 2
        identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
        return torch.linalg.solve(identity + q, -2 * q, left=False)

    def changed(self, matrix: Tensor) -> Tensor:
        return self.boft_s.view(-1, 1) * super().changed(matrix)

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        if not isinstance(self.layer, LinearLayer):
            return super().forward(inner, x)
        y = self.below(inner, self.rotate(x))
        bias = inner.bias if self.bias is None else self.bias
        base = y if bias is None else y - bias.to(y.dtype)
        return torch.addcmul(y, base, (self.boft_s.flatten() - 1).to(y.dtype))  # s y as y + (s - 1) y, without the bias


def _butterfly(width: int, blocks: int, half: int, factors: int) -> Tensor:
    """The order of the inputs (in,): within each of `blocks` parts, even runs of `half` inputs before odd ones."""
    if factors == 1:
        return torch.arange(width)
    runs = torch.arange(width).view(blocks, -1, half)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], dim=1).flatten()
