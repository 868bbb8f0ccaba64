"""States in 8 bits: in blocks of 256 numbers each is a code of the dynamic code book times the block's largest one.

Source: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, https://arxiv.org/abs/2110.02861.
N numbers, K blocks.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from smidgen.quant.codes import dynamic_book

BLOCK = 256


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The code book; the bound above each code; and for the upper half of a float32's bits the least code it may have.

    Floats whose upper halves are equal differ by less than two codes do, so that at most one bound lies between them.
    """
    code = dynamic_book(signed)
    bounds = (code[1:] + code[:-1]) / 2
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
    least = torch.where(halves < 0, halves + 2**16 - 1, halves).view(torch.float32)
    first = torch.bucketize(least.nan_to_num(nan=0.0), bounds, out_int32=True)
    return code.to(device), F.pad(bounds, (0, 1), value=torch.inf).to(device), first.to(device)


def quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The codes (N,) of float32 numbers (N,), each the nearest there is, and the largest size of each block (K,)."""
    _, bounds, first = _tables(signed, x.device)
    blocks = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * absmax.clamp(min=torch.finfo(x.dtype).tiny).reciprocal()[:, None]).view(-1)
    least = first.index_select(0, (scaled.view(torch.int32) >> 16).add_(2**15))
    codes = least.add_(scaled > bounds.index_select(0, least))
    return codes[: len(x)].to(torch.uint8), absmax


def dequantise(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 numbers (N,) that codes (N,) stand for, with the largest size of each block (K,)."""
    values = _tables(signed, codes.device)[0].index_select(0, F.pad(codes, (0, -len(codes) % BLOCK)).int())
    return values.view(-1, BLOCK).mul_(absmax[:, None]).view(-1)[: len(codes)]
