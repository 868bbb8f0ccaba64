"""Rotary position embedding (https://arxiv.org/abs/2104.09864). Letters: T tokens, H heads, D head width, R angles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.kernels.native import Kernel, takes

_native = Kernel("rope", "pnnpnnpnpnnnnnnf")


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first 2 R numbers of each head, pair by pair, by the angles of the token; the others stay.

    Args:
        x: (..., T, H, D); any strides, but the last dimension should be dense.
        cos, sin: (..., T, R), one angle for each pair (of transformers' tables, whose halves are equal, the first
            half); they take no gradient. They are used in float32.
        interleaved: pairs are (0, 1), (2, 3)... as in GPT-J and Cohere; otherwise i and i + R, as in Llama.

    Returns:
        The shape and type of `x`, contiguous.
    """
    if not takes(x) or not cos.is_cpu:
        return rope_reference(x, cos, sin, interleaved)
    return _Rope.apply(x, cos, sin, interleaved)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rope` in plain PyTorch."""
    r = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    turned, rest = x[..., : 2 * r].to(wide), x[..., 2 * r :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def rotated(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, sign: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """The native `rope` without autograd. `sign` -1 turns back, which is the gradient.

    Args:
        out: (T, H, D) with a dense last dimension, possibly `x` itself; by default a new tensor.
    """
    tokens = x.reshape(-1, *x.shape[-2:])
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    cos, sin = (table.float().reshape(-1, table.shape[-1]) for table in (cos, sin))
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    y = torch.empty(x.shape, dtype=x.dtype) if out is None else out
    into = y.view(tokens.shape)
    _native(
        x.dtype,
        *(tokens, tokens.stride(0), tokens.stride(1), into, into.stride(0), into.stride(1)),
        *(cos, cos.stride(0), sin, sin.stride(0), *tokens.shape, cos.shape[1], interleaved, sign),
    )
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, sin, ctx.interleaved, -1.0), None, None, None
