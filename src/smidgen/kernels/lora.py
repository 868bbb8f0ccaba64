"""A linear layer with low-rank updates beside it (https://arxiv.org/abs/2106.09685), as one operation.

Letters: N rows (all dimensions but the last), I inputs, O outputs, R rank.

The base product runs in the type of `x`. What the factors take part in runs in float32 on native kernels that drop on
the way, so that a float32 adapter over a bfloat16 base is as exact as if all were float32, and neither the mask nor the
dropped input is ever stored: kept for backward are the input, which the layer below keeps anyway, and x A^T (N, R) of
each adapter. Above a rank of 32 bfloat16 products of PyTorch are faster, and are taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from smidgen.errors import UsageError
from smidgen.kernels.dequantize import Packed, Stack, matrix, outputs
from smidgen.kernels.dropout import dropout, dropped, mask_arguments
from smidgen.kernels.native import Kernel, eager, plain, rows, takes

_LARGEST_RANK = 32
_MOST_PARTS = 16  # partial sums of a factor's gradient, one for each part of the rows
_down = Kernel("low_rank_down", "pnppnnnnn")
_outer = Kernel("low_rank_outer", "ppnpnnnnnn")
_up = Kernel("low_rank_up", "pppnnnnnn")


class LowRank(NamedTuple):
    """One update: scaling dropout(x) A^T B^T."""

    a: Any  # (R, I)
    b: Any  # (O, R)
    scaling: float
    p: float = 0.0  # share of the inputs that is dropped
    seed: int = 0
    first: int = 0  # of the outputs it is for, where one product stands for several layers

    @classmethod
    def drawn(cls, a: Tensor, b: Tensor, scaling: float, dropout: nn.Dropout) -> LowRank:
        """The update under `dropout`. Its mask follows from a seed drawn as a mask is: a resumed run draws the same."""
        p = dropout.p if dropout.training else 0.0
        return cls(a, b, scaling, p, int(torch.randint(2**62, ())) if p else 0)


class Linear(NamedTuple):
    """A linear layer and its updates; or for each of its tensors the gradient, or whether that is wanted."""

    weight: Any  # (O, I), or how it is stored
    bias: Any  # (O,) or None
    updates: tuple[LowRank, ...]


def as_one(x: Tensor, weight: Tensor | Packed | Stack, bias: Tensor | None = None) -> bool:
    """Whether `lora_linear` is one operation for an input and such weights, and nothing else decides on its type."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    if isinstance(weight, Tensor):
        return plain(x, weight, bias)
    # On every device: otherwise the dense weight would be kept for backward.
    return eager(x, bias) and weight.dtype == x.dtype


def lora_linear(x: Tensor, weight: Tensor | Packed | Stack, bias: Tensor | None, adapters: Sequence[LowRank]) -> Tensor:
    """x W^T + bias + the sum of scaling dropout(x) A^T B^T over the adapters.

    Args:
        x: (..., I), of the type of `weight`.
        weight: (O, I); one that is stored is made dense for each product. bias: (O,), of the same type.
        adapters: the updates, whose factors may be of another type; each has its own rank, dropout and seed.

    Returns:
        (..., O).

    Raises:
        UsageError: shapes do not fit.
    """
    size = outputs(weight), x.shape[-1]
    for i, adapter in enumerate(adapters):
        if adapter.a.shape != (adapter.b.shape[1], size[1]) or adapter.b.shape[0] != size[0]:
            raise UsageError(
                f"adapter {i}: A {tuple(adapter.a.shape)} and B {tuple(adapter.b.shape)} must be (R, I) and (O, R) for "
                f"the weight (O, I) = {size}"
            )
    if not (plain(x, weight, bias) if isinstance(weight, Tensor) else eager(x, bias)):
        return lora_linear_reference(x, weight, bias, adapters)
    factors = [factor for adapter in adapters for factor in (adapter.a, adapter.b)]
    settings = [(adapter.scaling, adapter.p, adapter.seed) for adapter in adapters]
    return _LoraLinear.apply(x, weight, bias, settings, *factors)


def lora_linear_reference(
    x: Tensor, weight: Tensor | Packed | Stack, bias: Tensor | None, adapters: Sequence[LowRank]
) -> Tensor:
    """`lora_linear` in plain PyTorch."""
    y = functional.linear(x, matrix(weight), bias)
    for a, b, scaling, p, seed, _ in adapters:
        low = functional.linear(dropout(x, p, seed).to(y.dtype), a.to(y.dtype))
        y = y + functional.linear(low, (scaling * b).to(y.dtype))
    return y


def down(x: Tensor, a: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """dropout(x) a^T, (N, R) float32, of x (N, I) and a (R, I) float32."""
    if not _native(x, len(a)):
        return (_dropped(x, p, seed) @ a.to(x.dtype).t()).float()
    low = torch.empty(x.shape[0], a.shape[0])
    _down(x.dtype, x, x.stride(0), a.contiguous(), low, *x.shape, len(a), *mask_arguments(p, seed))
    return low


def outer(low: Tensor, x: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """low^T dropout(x), (R, I) float32, of low (N, R) float32 and x (N, I)."""
    rank = low.shape[1]
    if not _native(x, rank):
        return (low.to(x.dtype).t() @ _dropped(x, p, seed)).float()
    parts = max(1, min(_MOST_PARTS, x.shape[0] // 256))
    sums = torch.empty(parts, rank, x.shape[1])
    _outer(x.dtype, low, x, x.stride(0), sums, parts, *x.shape, rank, *mask_arguments(p, seed))
    return sums.sum(0)


def up(y: Tensor, low: Tensor, a: Tensor, p: float = 0.0, seed: int = 0) -> None:
    """y += dropout(low a), in place, of y (N, I), low (N, R) float32 and a (R, I) float32."""
    if not _native(y, len(a)):
        update = low.to(y.dtype), a.to(y.dtype)
        if p == 0:
            y.addmm_(*update)
        else:
            dropped(torch.mm(*update), p, seed, add_to=y)
    else:
        _up(y.dtype, low, a.contiguous(), y, y.stride(0), *y.shape, len(a), *mask_arguments(p, seed))


def _native(x: Tensor, rank: int) -> bool:
    return rank <= _LARGEST_RANK and takes(x)


def _dropped(x: Tensor, p: float, seed: int) -> Tensor:
    return x if p == 0 else dropped(x, p, seed)


def product(x: Tensor, layer: Linear, lows: Sequence[Tensor] | None = None) -> tuple[Tensor, Sequence[Tensor]]:
    """`lora_linear` without autograd, of a matrix x (N, I), and x A^T of each update unless they are given."""
    y = functional.linear(x, matrix(layer.weight), layer.bias)
    if lows is None:
        lows = [down(x, update.a.float(), update.p, update.seed) for update in layer.updates]
    for update, low in zip(layer.updates, lows):
        up(_outputs(y, update), low * update.scaling, update.b.float().t())
    return y, lows


def product_backward(
    grad: Tensor, layer: Linear, of_x: bool = True, add_to: Tensor | None = None
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x, if wanted, and of x A^T of each update.

    Args:
        grad: (N, O), contiguous.
        add_to: (N, I): the gradient of x is added to it in place.
    """
    lows = [down(_outputs(grad, update), update.b.float().t()) * update.scaling for update in layer.updates]
    if not of_x:
        return None, lows
    weight = matrix(layer.weight)
    grad_x = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
    for update, low in zip(layer.updates, lows):
        up(grad_x, low, update.a.float(), update.p, update.seed)
    return grad_x, lows


def product_gradients(
    grad: Tensor, x: Tensor, layer: Linear, lows: Sequence[Tensor], grad_lows: Sequence[Tensor], wanted: Linear
) -> Linear:
    """The gradients of a layer's tensors, None where not `wanted`, both in the places that the tensors have.

    Args:
        lows, grad_lows: x A^T of each update, and their gradients.
    """
    updates = []
    for update, low, grad_low, want in zip(layer.updates, lows, grad_lows, wanted.updates):
        of_a = outer(grad_low, x, update.p, update.seed).to(update.a.dtype) if want.a else None
        of_b = outer(low * update.scaling, _outputs(grad, update)).t().to(update.b.dtype) if want.b else None
        updates.append(update._replace(a=of_a, b=of_b))
    of_weight = grad.t() @ x if wanted.weight is True else None
    of_bias = grad.sum(0) if wanted.bias else None
    return Linear(of_weight, of_bias, tuple(updates))


def _outputs(y: Tensor, update: LowRank) -> Tensor:
    return y[:, update.first : update.first + len(update.b)]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Any, bias: Tensor | None, settings: list, *factors: Tensor) -> Tensor:
        y, lows = product(rows(x).contiguous(), _layer(weight, bias, settings, factors))
        ctx.settings, ctx.stored = settings, None if isinstance(weight, Tensor) else weight
        ctx.save_for_backward(x, None if ctx.stored else weight, bias, *factors, *lows)
        return y.view(*x.shape[:-1], outputs(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        x, weight, bias, *rest = ctx.saved_tensors
        count = 2 * len(ctx.settings)
        layer = _layer(ctx.stored or weight, bias, ctx.settings, rest[:count])
        of_x, of_weight, of_bias, _, *of_factors = ctx.needs_input_grad
        g = rows(grad).contiguous()
        grad_x, grad_lows = product_backward(g, layer, of_x)
        wanted = _layer(of_weight, of_bias, ctx.settings, of_factors)
        grads = product_gradients(g, rows(x).contiguous(), layer, rest[count:], grad_lows, wanted)
        factors = [factor for update in grads.updates for factor in (update.a, update.b)]
        return None if grad_x is None else grad_x.view(x.shape), grads.weight, grads.bias, None, *factors


def _layer(weight: Any, bias: Any, settings: list[tuple[float, float, int]], factors: Sequence[Any]) -> Linear:
    pairs = zip(factors[::2], factors[1::2], settings)
    return Linear(weight, bias, tuple(LowRank(a, b, *setting) for a, b, setting in pairs))
