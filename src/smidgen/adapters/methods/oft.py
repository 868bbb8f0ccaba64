"""OFT: blocks of inputs are rotated, which keeps the angles between neurons (https://arxiv.org/abs/2306.07280).

The Neumann series in place of an inverse is from https://arxiv.org/abs/2506.19847. Legend: the weight is a matrix
(out, in), n the width of a block, N the number of blocks, Q a skew-symmetric matrix (n, n).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.config import WeightConfig, fraction, whole_number
from smidgen.adapters.layers import ConvLayer, EmbeddingLayer, LinearLayer
from smidgen.adapters.targeted import Blocks, device_of


@dataclass(kw_only=True)
class OFTConfig(WeightConfig):
    """The configuration of OFT. Names and meanings are those of Hugging Face adapter files.

    Args:
        r: the number of blocks of each layer; with it oft_block_size must be 0.
        oft_block_size: the width of a block; what does not divide the inputs becomes the nearest divisor.
        module_dropout: share of the blocks that are not rotated in a training step.
        coft: keep the rotation small: the norm of Q is at most `eps` / sqrt(N).
        eps: see `coft`.
        block_share: all blocks of a layer are rotated alike.
        use_cayley_neumann: a Neumann series in place of the inverse in Cayley's map.
        num_cayley_neumann_terms: its number of terms.
    """

    peft_type: ClassVar[str] = "OFT"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def problems(self) -> list[str]:
        lines = super().problems() + fraction("module_dropout", self.module_dropout)
        lines += whole_number("r", self.r, 0) + whole_number("oft_block_size", self.oft_block_size, 0)
        lines += whole_number("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 2, 100)
        if (self.r == 0) == (self.oft_block_size == 0):
            lines.append(f"r: {self.r} and oft_block_size: {self.oft_block_size}; one of them must be 0, the other not")
        return lines


class OFT(Blocks):
    """W R^T with R block-diagonal and orthogonal, each block Cayley's map of a skew-symmetric matrix."""

    config_class = OFTConfig
    kinds = (LinearLayer, ConvLayer, EmbeddingLayer)

    def __init__(self, base: Any, config: OFTConfig, shared: Any = None):
        super().__init__(base, config, shared)
        self.config, self.dropout = config, config.module_dropout
        embedding = isinstance(self.layer, EmbeddingLayer)
        width = self.layer.shape[0 if embedding else 1]
        divisor = _nearest_divisor(width, config.r or config.oft_block_size)
        self.count, size = (divisor, width // divisor) if config.r else (width // divisor, divisor)
        if divisor != (config.r or config.oft_block_size) and not config.inference_mode:
            field = "r" if config.r else "oft_block_size"
            asked = f"{field}: {config.r or config.oft_block_size}"
            warnings.warn(f"{asked} does not divide {width}; {divisor} is taken", stacklevel=2)
        start = torch.zeros if config.init_weights else lambda *shape, device: 0.1 * torch.randn(*shape, device=device)
        entries = start(1 if config.block_share else self.count, size * (size - 1) // 2, device=device_of(base))
        self.name = "oft_embedding_R" if embedding else "oft_R"
        self.add_module(self.name, nn.ParameterDict({"weight": nn.Parameter(entries)}))
        self.register_buffer("upper", torch.triu_indices(size, size, 1, device=entries.device), persistent=False)
        self.size = size

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        return self.turn(x, self._minus_identity(), back)

    def _minus_identity(self) -> Tensor:
        """R - I, (N, n, n)."""
        config = self.config
        entries: Any = self.get_submodule(self.name)["weight"]  # pyright: ignore[reportIndexIssue]
        if config.coft:  # the gradient is that of the point nearest by, inside
            norm = math.sqrt(2) * entries.detach().norm(dim=1, keepdim=True)
            most = config.eps / math.sqrt(len(entries))
            entries = entries + (entries * (most / norm.clamp_min(most)) - entries).detach()
        q = entries.new_zeros(len(entries), self.size, self.size)
        q = q.index_put((torch.arange(len(entries), device=q.device)[:, None], *self.upper), entries)  # type: ignore[misc]
        q = q - q.mT
        if not config.use_cayley_neumann:
            identity = torch.eye(self.size, device=q.device, dtype=q.dtype)
            turned = torch.linalg.solve(identity + q, -2 * q, left=False)
        else:
            # 2 Q + 2 Q^2 + ... + Q^k; files of three terms mean four.
            terms = config.num_cayley_neumann_terms
            last, power, turned = max(3, terms - 1), q, 2 * q
            for exponent in range(2, last + 1) if terms > 2 else ():
                power = power @ q
                turned = turned + (power if exponent == last else 2 * power)
        return turned.expand(self.count, -1, -1)


def _nearest_divisor(width: int, wanted: int) -> int:
    """The divisor of `width` nearest to `wanted`, the smaller of two."""
    divisors = (number for number in range(1, width + 1) if width % number == 0)
    return min(divisors, key=lambda number: (abs(number - wanted), number))
