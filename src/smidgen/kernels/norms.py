"""RMSNorm (https://arxiv.org/abs/1910.07467) and LayerNorm (https://arxiv.org/abs/1607.06450).

Letters: N rows, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.kernels.native import Kernel, rows, takes

_MOST_PIECES = 64  # partial sums of the gradients of weight and bias, one for each piece of the rows
_forward = Kernel("norm", "pnpnpppppp" + "nnffn")
_backward = Kernel("norm_backward", "pnppnpnpp" + "pppnnnfn")


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), the mean over the last dimension.

    Args:
        x: (..., D).
        weight: (D,).
        offset: 1 for Gemma, whose weights start at zero.
        cast_first: the normalised x is rounded to the type of `x` before it is multiplied, as Llama, Qwen and Mistral
            do; Gemma and torch.nn.RMSNorm multiply in float32 and round once.

    Returns:
        (..., D), contiguous where the native kernel runs.
    """
    if not takes(x, weight):
        return rms_norm_reference(x, weight, eps, offset, cast_first)
    return _Norm.apply(x, None, weight, None, eps, offset, cast_first, False)[1]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """The sum x + residual, in the type of `x`, and its `rms_norm`, in one pass over the memory."""
    if x.shape != residual.shape or not takes(x, residual, weight):
        total = x + residual
        return total, rms_norm_reference(total, weight, eps, offset, cast_first)
    return _Norm.apply(x, residual, weight, None, eps, offset, cast_first, False)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32, rounded once."""
    if not takes(x, weight, bias):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return _Norm.apply(x, None, weight, bias, eps, 0.0, False, True)[1]


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """`rms_norm` in plain PyTorch."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if cast_first:
        return (weight + offset) * normal.to(x.dtype)
    return (normal * (weight.to(wide.dtype) + offset)).to(x.dtype)


class Norm(NamedTuple):
    """How a row is normed: `rms_norm`, or `layer_norm` where `centered`."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    offset: float = 0.0
    cast_first: bool = True
    centered: bool = False


class Normed(NamedTuple):
    """What norming answers."""

    total: Tensor  # the sum that was normed; the input itself where nothing was added
    y: Tensor
    scale: Tensor  # (N,) float32: 1 / sqrt(...) of each row
    mean: Tensor | None  # (N,) float32, where it is subtracted


def normed(x: Tensor, norm: Norm, residual: Tensor | None = None) -> Normed:
    """The native norm of x, or of x + residual, without autograd."""
    matrix = rows(x)
    n, width = matrix.shape
    other = None if residual is None else rows(residual)
    y = torch.empty(x.shape, dtype=x.dtype)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    scale = torch.empty(n)
    mean = torch.empty(n) if norm.centered else None
    _forward(
        x.dtype,
        *(matrix, matrix.stride(0), other, 0 if other is None else other.stride(0), norm.weight, norm.bias),
        *(total, y, mean, scale, n, width, norm.eps, norm.offset, norm.cast_first),
    )
    return Normed(x if total is None else total, y, scale, mean)


def normed_backward(
    x: Tensor,
    norm: Norm,
    scale: Tensor,
    mean: Tensor | None,
    grad: Tensor,
    more: Tensor | None = None,
    wanted: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, plus `more` if given, and of weight and bias where `wanted`; `x` is what was normed."""
    matrix, g = rows(x), rows(grad)
    other = None if more is None else rows(more)
    n, width = matrix.shape
    pieces = max(1, min(n, _MOST_PIECES))
    sums = [torch.zeros(pieces, width) if want else None for want in wanted]
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    _backward(
        x.dtype,
        *(matrix, matrix.stride(0), norm.weight, g, g.stride(0), other, 0 if other is None else other.stride(0)),
        *(mean, scale, grad_x, *sums, n, width, pieces, norm.offset, norm.cast_first),
    )
    of_weight, of_bias = (None if s is None else s.sum(0).to(x.dtype) for s in sums)
    return grad_x, of_weight, of_bias


class _Norm(torch.autograd.Function):
    """Answers the sum and its norm; without a residual the sum is x itself and has no gradient."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, *how):
        norm = Norm(weight, bias, *how)
        total, y, scale, mean = normed(x, norm, residual)
        ctx.save_for_backward(total, weight, scale, mean)
        ctx.how, ctx.with_sum = how, residual is not None
        ctx.set_materialize_grads(False)
        return None if residual is None else total, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum: Tensor | None, grad: Tensor | None) -> Any:
        if grad is None:  # the norm was not used
            return grad_sum, grad_sum, *[None] * 6
        x, weight, scale, mean = ctx.saved_tensors
        norm = Norm(weight, None, *ctx.how)
        wanted = ctx.needs_input_grad[2:4]
        grad_x, of_weight, of_bias = normed_backward(x, norm, scale, mean, grad, grad_sum, wanted)
        return grad_x, grad_x if ctx.with_sum else None, of_weight, of_bias, *[None] * 4
