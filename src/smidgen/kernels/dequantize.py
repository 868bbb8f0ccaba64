"""Weights that are stored in 4 or 8 bits, and making them dense again.

NF4 is from QLoRA (https://arxiv.org/abs/2305.14314), double quantisation too; rows of int8 are those of LLM.int8()
(https://arxiv.org/abs/2208.07339). Codes and scales are laid out as bitsandbytes does.

Letters: O outputs, I inputs, C blocks: the row-major weight is cut into blocks of `block_size` numbers that share a
scale; the last may be short.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from smidgen.errors import UsageError
from smidgen.kernels.native import Kernel, takes

Kind = Literal["nf4", "fp4", "int8"]
NESTED_BLOCK = 256  # scales that share a scale

_FP4 = (0.0, 0.0625, 8, 12, 4, 6, 2, 3)
# What the 16 codes stand for. NF4: quantiles of the normal distribution, eight above zero and seven below. FP4: a sign,
# two bits of exponent and one of fraction. Both are divided by their largest.
BOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": tuple(value / 12 for value in (*_FP4, *(0.0 - value for value in _FP4))),
}
_INT8_STEP = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it; float32 rounds it
_blocks = Kernel("dequantize_blocks", "ppppp" + "fppnn")
_rows = Kernel("dequantize_rows", "pppnnf")


class Nested(NamedTuple):
    """Scales that are stored in 8 bits: each is book[code] * scale + offset."""

    scales: Any  # (C / 256, rounded up) float32
    book: Any  # (256,) float32, ascending
    offset: float


class Packed(NamedTuple):
    """A stored weight of a linear layer."""

    kind: Kind
    shape: tuple[int, int]  # (O, I)
    dtype: torch.dtype  # of the dense weight, which it is computed with
    codes: Any  # (O I / 2, rounded up) uint8, the first of each two in the high half; int8: (O, I) int8
    scales: Any  # (C,) float32, or where they are nested uint8: the largest of each block, or for int8 of each row
    block_size: int  # for int8 I
    nested: Nested | None = None


def dense(packed: Packed, out: Tensor | None = None) -> Tensor:
    """The weight (O, I) that `packed` stands for: code * scale in float32, rounded once to its dtype.

    Args:
        out: (O, I) contiguous, of that dtype: where it goes, such as some rows of a taller matrix.

    Raises:
        UsageError: `out` is not such a tensor, or the parts of `packed` do not fit together.
    """
    check(packed)
    if out is None:
        out = torch.empty(packed.shape, dtype=packed.dtype, device=packed.codes.device)
    elif out.shape != packed.shape or out.dtype != packed.dtype or not out.is_contiguous():
        raise UsageError(
            f"out must be contiguous, {packed.dtype} and of shape {packed.shape}, "
            f"got {out.dtype} of shape {tuple(out.shape)} with strides {out.stride()}"
        )
    if not takes(out) or not packed.codes.is_cpu:
        return out.copy_(dense_reference(packed))
    codes, scales, nested = packed.codes.contiguous(), packed.scales.contiguous(), packed.nested
    if packed.kind == "int8":
        _rows(out.dtype, codes, scales, out, *packed.shape, _INT8_STEP)
    else:
        scaled = (scales, None, None, None, 0.0) if nested is None else (None, scales, *nested)
        _blocks(out.dtype, codes, *scaled, _book(packed.kind), out, out.numel(), packed.block_size)
    return out


class Stack(NamedTuple):
    """Stored weights of one dtype, whose matrices stand one below the other."""

    parts: tuple[Packed, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype


def outputs(weight: Tensor | Packed | Stack) -> int:
    """O of a weight, stored or not."""
    if isinstance(weight, Stack):
        return sum(map(outputs, weight.parts))
    return weight.shape[0]


def matrix(weight: Tensor | Packed | Stack) -> Tensor:
    """A weight (O, I), made dense where it is stored."""
    if isinstance(weight, Packed):
        return dense(weight)
    if not isinstance(weight, Stack):
        return weight
    first = weight.parts[0]
    tile = first.codes.new_empty(outputs(weight), first.shape[1], dtype=weight.dtype)
    for packed, part in zip(weight.parts, tile.split([packed.shape[0] for packed in weight.parts])):
        dense(packed, part)
    return tile


def dense_reference(packed: Packed) -> Tensor:
    """`dense` in plain PyTorch."""
    count = math.prod(packed.shape)
    scales = block_scales(packed)
    if packed.kind == "int8":
        return (packed.codes * scales[:, None] * _INT8_STEP).to(packed.dtype)
    values = functional.embedding(packed.codes.int(), _pairs(packed.kind, packed.codes.device)).view(-1)[:count]
    if short := -count % packed.block_size:
        values = functional.pad(values, (0, short))
    weight = (values.view(-1, packed.block_size) * scales[:, None]).to(packed.dtype)
    return weight.view(-1)[:count].view(packed.shape)


def block_scales(packed: Packed) -> Tensor:
    """The scale of each block (C,) or, for int8, of each row (O,); float32."""
    if packed.nested is None:
        return packed.scales
    scales, book, offset = packed.nested
    wide = scales.repeat_interleave(NESTED_BLOCK)[: len(packed.scales)]
    return functional.embedding(packed.scales.int(), book[:, None])[:, 0] * wide + offset


class Part(NamedTuple):
    """One tensor of a `Packed`, and what it must be."""

    name: str
    tensor: Tensor
    dtype: torch.dtype
    count: int


def parts(packed: Packed) -> Iterator[Part]:
    """The tensors of `packed`."""
    count, nested = math.prod(packed.shape), packed.nested
    blocks = -(-count // packed.block_size)
    eight = packed.kind == "int8"
    yield Part("codes", packed.codes, torch.int8 if eight else torch.uint8, count if eight else (count + 1) // 2)
    yield Part("scales", packed.scales, torch.uint8 if nested else torch.float32, blocks)
    if nested:
        yield Part("nested.scales", nested.scales, torch.float32, -(-blocks // NESTED_BLOCK))
        yield Part("nested.book", nested.book, torch.float32, 256)


def check(packed: Packed) -> None:
    """Raise a UsageError where a tensor is not of the dtype and size that the others ask for."""
    for name, tensor, dtype, count in parts(packed):
        if tensor.dtype != dtype or tensor.numel() != count:
            raise UsageError(
                f"{name} of a stored weight of shape {packed.shape} must be {count:,} numbers of {dtype}, got "
                f"{tensor.numel():,} of {tensor.dtype}; a model with stored weights must not be cast, only moved"
            )


@functools.cache
def _book(kind: str) -> Tensor:
    return torch.tensor(BOOKS[kind])


@functools.cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """(256, 2) float32: what the two codes in a byte stand for."""
    book = _book(kind)
    return torch.stack([book.repeat_interleave(16), book.repeat(16)], 1).to(device)
