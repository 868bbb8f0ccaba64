"""Dropout whose mask is computed from a seed and the place of each element, so that it is never stored.

Letters: N rows (all dimensions but the last), D width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.errors import UsageError
from smidgen.kernels.native import Kernel, plain, rows, takes

_BLOCK = 32  # elements that share 16 random words of 32 bits: the low halves decide the first 16 of them
_PIECE = 16384  # blocks
_native = Kernel("dropout", "pnpnnnnnn")


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """`x` with a share `p` of its elements zero and the others divided by 1 - p.

    The mask is the same for the same seed and shape, in forward and backward, on any machine and number of threads.

    Args:
        x: (..., D), any floating type.
        p: from 0 to below 1; taken as the nearest multiple of 1/65536.
        seed: any whole number; 64 bits of it count.

    Returns:
        The shape and type of `x`, contiguous.

    Raises:
        UsageError: `p` is out of range.
    """
    threshold = _threshold(p)
    if threshold == 0:
        return x
    if not takes(x):
        return (x * scaled_mask(x.shape, p, seed, x.device)).to(x.dtype)
    return _Dropout.apply(x, p, seed)


def dropped(x: Tensor, p: float, seed: int, add_to: Tensor | None = None) -> Tensor:
    """`dropout` without autograd.

    Args:
        add_to: (..., D), contiguous: the result is added to it in place, and it is returned.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if add_to is None else add_to
    if not takes(x, out):
        if plain(x):
            update = _kept(x, p, seed).mul_(_scale(_threshold(p)))
        else:
            update = x * scaled_mask(x.shape, p, seed, x.device)
        return out.copy_(update) if add_to is None else out.add_(update)
    matrix, into = rows(x), out.view(-1, out.shape[-1])
    _native(
        x.dtype,
        *(matrix, matrix.stride(0), into, into.stride(0), *matrix.shape),
        *(*mask_arguments(p, seed), add_to is not None),
    )
    return out


def scaled_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """What `dropout` multiplies by: 0, or 1 / (1 - p), float32. The definition of the mask, in plain PyTorch.

    Element j of row i belongs to block j // 32. Its random word is the hash of the counter (32-bit)
    16 (i ceil(D / 32) + j // 32) + j % 16, and of that word the low 16 bits (j % 32 < 16) or the high ones. The element
    stays if they are at least 65536 p. The hash is a multiplicative spread and the two-round mix of 32-bit integers by
    C. Wellons ("Prospecting for hash functions", 2018), each round with half of the mixed seed.
    """
    threshold = _threshold(p)
    key = _key(seed)
    low, high, ones = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, 0xFFFFFFFF
    width = shape[-1]
    count = 1
    for size in shape[:-1]:
        count *= size
    blocks = -(-width // _BLOCK)
    x = torch.arange(count * blocks * 16, device=device)
    x = ((x * 0x9E3779B9) & ones) ^ low
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & ones
    x = (((x ^ (x >> 15)) + high & ones) * 0x846CA68B) & ones
    x = x ^ (x >> 16)
    words = torch.stack((x & 0xFFFF, x >> 16)).view(2, count, blocks, 16)
    stays = words.permute(1, 2, 0, 3).reshape(count, blocks * _BLOCK)[:, :width] >= threshold
    return (stays.to(torch.float32) * _scale(threshold)).view(shape)


def _kept(x: Tensor, p: float, seed: int) -> Tensor:
    """`dropped` in plain PyTorch on a CPU, not divided by 1 - p: the bits of what stays, and zero."""
    words = torch.int16 if x.element_size() == 2 else torch.int32
    stays = _stays(x.numel() // max(x.shape[-1], 1), x.shape[-1], _threshold(p), _key(seed))
    return (x.view(words) & stays.view(x.shape).to(words)).view(x.dtype)


@functools.lru_cache(maxsize=1)  # backward asks for the same mask twice
def _stays(count: int, width: int, threshold: int, key: int) -> Tensor:
    """The mask of `scaled_mask` as int16 (N, D), all bits set where an element stays.

    By operations on 32-bit integers in a piece of memory that fits the cache, and results of 16 bits: PyTorch is slow
    with booleans.
    """
    blocks = -(-width // _BLOCK)
    stays = torch.empty(count * blocks, 2, 16, dtype=torch.int16)
    spread = torch.arange(min(_PIECE, len(stays)) * 16, dtype=torch.int32).mul_(_signed(0x9E3779B9))
    for first in range(0, len(stays), _PIECE):
        out = stays[first : first + _PIECE]
        x = spread[: len(out) * 16] + _signed(first * 16 * 0x9E3779B9)
        shifted = torch.empty_like(x)
        x ^= _signed(key)
        x ^= _shifted(x, 16, shifted)
        x *= 0x7FEB352D
        x ^= _shifted(x, 15, shifted)
        x += _signed(key >> 32)
        x *= _signed(0x846CA68B)
        x ^= _shifted(x, 16, shifted)
        x ^= _signed(0x80008000)  # numbers without sign in the order of those with one
        torch.ge(x.view(torch.int16).view(-1, 16, 2).transpose(1, 2), threshold - 0x8000, out=out)
    return stays.view(count, blocks * _BLOCK)[:, :width].neg()


def _shifted(x: Tensor, by: int, out: Tensor) -> Tensor:
    """x >> by of numbers without sign."""
    return torch.bitwise_right_shift(x, by, out=out).bitwise_and_((1 << 32 - by) - 1)


def _signed(x: int) -> int:
    """The low 32 bits as an int32."""
    x &= 0xFFFFFFFF
    return x - 2**32 if x >> 31 else x


def mask_arguments(p: float, seed: int) -> tuple[int, int]:
    """What a native kernel computes the mask from: the mixed seed and the threshold, which is 0 where p is."""
    return _key(seed), _threshold(p)


def _threshold(p: float) -> int:
    if not 0 <= p < 1:
        raise UsageError(f"dropout: p must be from 0 to below 1, got {p}")
    return min(round(p * 65536), 65535)


def _scale(threshold: int) -> float:
    return 65536 / (65536 - threshold)


def _key(seed: int) -> int:
    """The seed spread over 64 bits, so that neighbouring seeds have nothing in common (splitmix64), as an int64."""
    ones = 2**64 - 1
    z = (seed + 0x9E3779B97F4A7C15) & ones
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & ones
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & ones
    z ^= z >> 31
    return z - 2**64 if z >> 63 else z


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return dropped(grad, ctx.p, ctx.seed), None, None
