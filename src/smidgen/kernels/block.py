"""The two halves of a decoder block as one operation each: x + attention(norm(x)) and x + feed_forward(norm(x)).

Letters: N tokens of all rows, D width, H query heads, K key and value heads, W head width, I inner width.

Kept for backward are what the products need and what is dear: queries, keys and values, the attention's output, gate
and up. Norms, the activation, dropped inputs and the turned gradients are computed again or in place. `frugal` does not
keep gate and up, most of the memory, and makes them again from the input and the stored x A^T: half of the products of
a forward pass; nothing else is repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.kernels import native
from smidgen.kernels.attention import Scores, Spread, attended, attended_backward
from smidgen.kernels.dequantize import Packed, outputs
from smidgen.kernels.gated import Activation, gated_backward, gated_forward
from smidgen.kernels.lora import Linear, LowRank, product, product_backward, product_gradients
from smidgen.kernels.native import autocast
from smidgen.kernels.norms import Norm, normed, normed_backward
from smidgen.kernels.rope import rotated


class Attention(NamedTuple):
    """norm(x) becomes queries, keys and values; they are turned and attend; `mix` makes the result."""

    norm: Norm
    inputs: tuple[Linear, ...]  # of queries, keys and values in this order, or one of all
    query_norm: Norm | None  # of each head
    key_norm: Norm | None
    mix: Linear
    norm_after: Norm | None
    kv_heads: int
    head_width: int
    scores: Scores


class FeedForward(NamedTuple):
    """norm(x) becomes gate and up; `mix` makes the result of activation(gate) * up."""

    norm: Norm
    inputs: tuple[Linear, ...]  # of gate and up, or one of both
    mix: Linear
    norm_after: Norm | None
    activation: Activation


class Where(NamedTuple):
    """Where the tokens stand."""

    offsets: Tensor  # (S + 1,) int64: see `attention`
    cos: Tensor  # (N, R): see `rope`
    sin: Tensor
    spread: Spread | None = None  # how they attend, where some do so in several segments


def add_attention(x: Tensor, part: Attention, where: Where) -> Tensor:
    """x (..., D) plus the attention to it, or plus the norm of that, where there is a norm after.

    All tensors are such as the native kernels take, of one dtype but for low-rank factors.
    """
    return _AddAttention.apply(x, where, _map(part, _place), *_tensors(part))


def add_feed_forward(x: Tensor, part: FeedForward, frugal: bool = False) -> Tensor:
    """x (..., D) plus the feed-forward layer's answer to it, likewise."""
    return _AddFeedForward.apply(x, _map(part, _place), frugal, *_tensors(part))


def takes(x: Tensor, part: Attention | FeedForward) -> bool:
    """Whether native code can run: plain CPU tensors of the type of `x`, or made dense in it, but for factors."""
    on_cpu = all(tensor.is_cpu for tensor in _tensors(part))
    return on_cpu and native.takes(x, *_tensors(part, whole=False)) and _dense_types(part) <= {x.dtype}


def autocasted(part: Any) -> Any:
    """`part` with its tensors as autocast takes them, where it is on; factors and what is stored stay as they are."""
    return _map(part, autocast, whole=False)


# ---- trees of tuples whose leaves may be tensors ----

_PLACE = object()  # stands for a tensor in a tree that is kept without them


def _map(tree: Any, change: Callable[[Any], Any], whole: bool = True) -> Any:
    """`tree` with what `change` makes of each tensor, or of the place of one, in order.

    whole: also of low-rank factors and of stored weights, which are of types of their own.
    """
    if isinstance(tree, LowRank | Packed) and not whole:
        return tree
    if isinstance(tree, tuple):
        parts = [_map(part, change, whole) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return change(tree) if isinstance(tree, Tensor) or tree is _PLACE else tree


def _place(tensor: Tensor) -> Any:
    return _PLACE


def _tensors(tree: Any, whole: bool = True) -> list[Tensor]:
    found: list[Tensor] = []
    _map(tree, found.append, whole)
    return found


def _dense_types(tree: Any) -> set[torch.dtype]:
    """What stored weights are made dense in."""
    if isinstance(tree, Packed):
        return {tree.dtype}
    return set().union(*map(_dense_types, tree)) if isinstance(tree, tuple) else set()


def _filled(skeleton: Any, values: Iterator[Any]) -> Any:
    return _map(skeleton, lambda place: next(values))


def _in_places(skeleton: Any, tree: Any) -> Iterator[Any]:
    """What `tree` holds where `skeleton` has places; None where it has no such branch."""
    if isinstance(skeleton, tuple):
        for i, part in enumerate(skeleton):
            yield from _in_places(part, None if tree is None else tree[i])
    elif skeleton is _PLACE:
        yield tree


def _any(tree: Any) -> bool:
    """Whether a gradient of a layer is wanted."""
    return any(map(_any, tree)) if isinstance(tree, tuple) else tree is True


def _keep(ctx: Any, skeleton: Any, tensors: Sequence[Tensor], kept: tuple) -> None:
    ctx.trees = skeleton, _map(kept, _place)
    ctx.save_for_backward(*tensors, *_tensors(kept))


def _found(ctx: Any) -> Any:
    """The part, and what was kept for it."""
    values = iter(ctx.saved_tensors)
    return [_filled(tree, values) for tree in ctx.trees]


# ---- products of one input ----


def _products(
    x: Tensor, layers: tuple[Linear, ...], widths: Sequence[int], lows: Any = None
) -> tuple[list[Tensor], Any]:
    """The outputs of the layers, cut to `widths`, and x A^T of their updates, which are computed unless given."""
    made = [product(x, layer, lows and lows[i]) for i, layer in enumerate(layers)]
    outputs = [y for y, _ in made]
    return outputs if len(layers) > 1 else list(outputs[0].split(widths, dim=1)), tuple(low for _, low in made)


def _products_backward(
    grads: Sequence[Tensor], x: Callable[[], Tensor], layers: Any, lows: Any, wanted: Any, of_x: bool
) -> tuple[Tensor | None, Any]:
    """The gradients of the input, if wanted, and of the layers' tensors. x: computes the input again."""
    grad_x, low_grads = None, []
    for grad, layer in zip(grads, layers):
        grad_x, of_lows = product_backward(grad, layer, of_x, grad_x)
        low_grads.append(of_lows)
    if not _any(wanted):
        return grad_x, None
    again = x()
    parts = zip(grads, layers, lows, low_grads, wanted)
    return grad_x, tuple(product_gradients(g, again, layer, low, of, want) for g, layer, low, of, want in parts)


def _room(layers: tuple[Linear, ...], rows: int, widths: Sequence[int], dtype: torch.dtype) -> tuple[list, list]:
    """New gradients of the outputs of `layers`, and the same cut to `widths`."""
    whole = [torch.empty(rows, outputs(layer.weight), dtype=dtype) for layer in layers]
    return whole, whole if len(layers) > 1 else list(whole[0].split(widths, dim=1))


def _mixed(x: Tensor, y: Tensor, mix: Linear, norm_after: Norm | None) -> tuple[Tensor, Any, Any]:
    """x + mix(y), or x + norm_after(mix(y)); the lows of `mix`; what that norm had to norm, and its scale."""
    mixed, lows = product(y, mix)
    if norm_after is None:
        return mixed.add_(x), lows, None
    after = normed(mixed, norm_after)
    return after.y.add_(x), lows, (mixed, after.scale)


def _unnormed(grad: Tensor, after: Any, norm_after: Norm | None, wanted: Any) -> tuple[Tensor, Norm | None]:
    """The gradient before the norm after, and that of the norm."""
    if norm_after is None:
        return grad, None
    return _normed_backward(after[0], norm_after, after[1], grad, None, wanted)


def _normed_backward(
    x: Tensor, norm: Norm, scale: Tensor, grad: Tensor, more: Tensor | None, wanted: Norm
) -> tuple[Tensor, Norm]:
    grad_x, of_weight, _ = normed_backward(x, norm, scale, None, grad, more, (wanted.weight is True, False))
    return grad_x, norm._replace(weight=of_weight)


def _input_backward(
    grad: Tensor | None, x: Tensor, scale: Tensor, norm: Norm, above: Tensor, wanted: Norm, shape: torch.Size
) -> tuple[Tensor | None, Norm | None]:
    """The gradient of x, in its shape, from those of its norm, if that was wanted, and of the sum; and of the norm."""
    if grad is None:
        return None, None
    of_x, of_norm = _normed_backward(x, norm, scale, grad, above, wanted)
    return of_x.view(shape), of_norm


# ---- attention ----


class _Heads(NamedTuple):
    """Queries, keys and values as they attend (N, heads, W), and before a norm of each head, with its scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    raw: Any  # for queries and keys: None, or the tensor and the scale


def _heads(x: Tensor, part: Attention, where: Where) -> tuple[_Heads, Any]:
    made, lows = _products(x, part.inputs, _widths(part))
    q, k, v = (y.unflatten(1, (-1, part.head_width)) for y in made)
    turned, raw = [], []
    for y, norm in ((q, part.query_norm), (k, part.key_norm)):
        made_even = None if norm is None else normed(y, norm)
        turned.append(made_even.y if made_even else y)
        raw.append(made_even and (made_even.total, made_even.scale))
        rotated(turned[-1], where.cos, where.sin, out=turned[-1])
    return _Heads(turned[0], turned[1], v, tuple(raw)), lows


def _widths(part: Attention) -> list[int]:
    few = part.kv_heads * part.head_width
    return [sum(outputs(layer.weight) for layer in part.inputs) - 2 * few, few, few]


class _AddAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, where: Where, skeleton: Any, *tensors: Tensor) -> Tensor:
        part: Attention = _filled(skeleton, iter(tensors))
        matrix = x.reshape(-1, x.shape[-1]).contiguous()
        first = normed(matrix, part.norm)
        heads, lows = _heads(first.y, part, where)
        q, k, v = _spread(heads, where)
        out, lse = attended(q, k, v, where.offsets, part.scores)
        total, mix_lows, after = _mixed(matrix, _kept(out, where).flatten(1), part.mix, part.norm_after)
        kept = (matrix, first.scale, where, heads, lows, out, lse, mix_lows, after)
        _keep(ctx, skeleton, tensors, kept)
        return total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        part, (x, scale, where, heads, lows, out, lse, mix_lows, after) = _found(ctx)
        wanted = _filled(ctx.trees[0], iter(ctx.needs_input_grad[3:]))
        above = grad.reshape(x.shape).contiguous()

        g, of_norm_after = _unnormed(above, after, part.norm_after, wanted.norm_after)
        g, of_mix = _mix_backward(g, _kept(out, where).flatten(1), part.mix, mix_lows, wanted.mix)

        again = functools.cache(lambda: normed(x, part.norm).y)
        whole, cut = _room(part.inputs, len(x), _widths(part), x.dtype)
        q, k, v = (y.unflatten(1, (-1, part.head_width)) for y in cut)
        _attended_backward(heads, where, part.scores, out, lse, g, (q, k, v))
        of_heads = []
        for y, raw, norm, want in zip((q, k), heads.raw, part[2:4], wanted[2:4]):
            rotated(y, where.cos, where.sin, sign=-1.0, out=y)
            of_heads.append(None)
            if norm is not None:
                even, of_heads[-1] = _normed_backward(raw[0], norm, raw[1], y, None, want)
                y.copy_(even)

        below = ctx.needs_input_grad[0] or wanted.norm.weight
        g, of_inputs = _products_backward(whole, again, part.inputs, lows, wanted.inputs, below)
        of_x, of_norm = _input_backward(g, x, scale, part.norm, above, wanted.norm, grad.shape)
        grads = part._replace(
            norm=of_norm,
            inputs=of_inputs,
            query_norm=of_heads[0],
            key_norm=of_heads[1],
            mix=of_mix,
            norm_after=of_norm_after,
        )
        return of_x, None, None, *_in_places(ctx.trees[0], grads)


def _spread(heads: _Heads, where: Where) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the tokens as they attend."""
    q, k, v = (y if where.spread is None else y.index_select(0, where.spread.tokens) for y in heads[:3])
    return q, k, v


def _kept(out: Tensor, where: Where) -> Tensor:
    return out if where.spread is None else out.index_select(0, where.spread.kept)


def _attended_backward(
    heads: _Heads, where: Where, scores: Scores, out: Tensor, lse: Tensor, grad: Tensor, into: Sequence[Tensor]
) -> None:
    """Write the gradients of queries, keys and values `into` tensors: sums over the places where a token attends."""
    q, k, v = _spread(heads, where)
    if where.spread is None:
        attended_backward(q, k, v, where.offsets, scores, out, lse, grad.view(out.shape), into)
        return
    wide = torch.zeros_like(out)
    wide.index_copy_(0, where.spread.kept, grad.view(-1, *out.shape[1:]))
    parts = [torch.empty(y.shape, dtype=y.dtype) for y in (q, k, v)]
    attended_backward(q, k, v, where.offsets, scores, out, lse, wide, parts)
    into[0].copy_(parts[0].index_select(0, where.spread.kept))  # elsewhere it is 0
    for whole, part in zip(into[1:], parts[1:]):
        where.spread.summed(part, whole)


def _mix_backward(grad: Tensor, x: Tensor, mix: Linear, lows: Any, wanted: Any) -> tuple[Tensor, Any]:
    grad_x, of_mix = _products_backward([grad], lambda: x, (mix,), (lows,), (wanted,), True)
    assert grad_x is not None
    return grad_x, of_mix and of_mix[0]


# ---- feed-forward ----


class _AddFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, skeleton: Any, frugal: bool, *tensors: Tensor) -> Tensor:
        part: FeedForward = _filled(skeleton, iter(tensors))
        matrix = x.reshape(-1, x.shape[-1]).contiguous()
        first = normed(matrix, part.norm)
        gates, lows = _gates(first.y, part)
        inner = gated_forward(gates[0], gates[1], part.activation)
        total, mix_lows, after = _mixed(matrix, inner, part.mix, part.norm_after)
        kept = (matrix, first.scale, None if frugal else tuple(gates), lows, mix_lows, after)
        _keep(ctx, skeleton, tensors, kept)
        return total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        part, (x, scale, gates, lows, mix_lows, after) = _found(ctx)
        wanted = _filled(ctx.trees[0], iter(ctx.needs_input_grad[3:]))
        above = grad.reshape(x.shape).contiguous()

        g, of_norm_after = _unnormed(above, after, part.norm_after, wanted.norm_after)

        again = functools.cache(lambda: normed(x, part.norm).y)
        if gates is None:
            gates, _ = _gates(again(), part, lows)
        inner, low_grads = product_backward(g, part.mix)
        assert inner is not None
        whole, cut = _room(part.inputs, len(x), [inner.shape[1]] * 2, x.dtype)
        activated = torch.empty_like(inner)
        gated_backward(inner, gates[0], gates[1], part.activation, (cut[0], cut[1]), activated)
        of_mix = product_gradients(g, activated, part.mix, mix_lows, low_grads, wanted.mix)

        below = ctx.needs_input_grad[0] or wanted.norm.weight
        g, of_inputs = _products_backward(whole, again, part.inputs, lows, wanted.inputs, below)
        of_x, of_norm = _input_backward(g, x, scale, part.norm, above, wanted.norm, grad.shape)
        grads = part._replace(norm=of_norm, inputs=of_inputs, mix=of_mix, norm_after=of_norm_after)
        return of_x, None, None, *_in_places(ctx.trees[0], grads)


def _gates(x: Tensor, part: FeedForward, lows: Any = None) -> tuple[list[Tensor], Any]:
    width = sum(outputs(layer.weight) for layer in part.inputs) // 2
    return _products(x, part.inputs, [width, width], lows)
