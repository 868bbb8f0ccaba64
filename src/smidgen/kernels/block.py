"""A decoder block of a language model as one operation: norm, attention, norm, gated feed-forward layer, both added.

Letters: N tokens of all rows, D width, H query heads, K key and value heads, W head width, I inner width.

Beside the inputs of the two halves, backward needs queries, keys and values, the output of the attention, and gate and
up; norms, the activation and dropped inputs are computed again. `frugal` keeps neither gate and up nor queries, keys
and values, which are most of it, and multiplies again; the attention and the last product are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.kernels.attention import Scores, attended, attended_backward
from smidgen.kernels.gated import Activation, gated_backward, gated_forward
from smidgen.kernels.lora import Linear, product, product_backward, product_gradients
from smidgen.kernels.norms import Norm, Normed, normed, normed_backward
from smidgen.kernels.rope import rotated


class Attention(NamedTuple):
    """norm(x) becomes queries, keys and values, these are turned, attend, and are mixed by `mix`."""

    norm: Norm
    inputs: tuple[Linear, ...]  # of queries, keys and values, or one of all, in this order
    query_norm: Norm | None  # of each head
    key_norm: Norm | None
    mix: Linear
    norm_after: Norm | None
    kv_heads: int
    head_width: int
    scores: Scores


class FeedForward(NamedTuple):
    """norm(x) becomes gate and up, activation(gate) * up becomes the result by `mix`."""

    norm: Norm
    inputs: tuple[Linear, ...]  # of gate and up, or one of both
    mix: Linear
    norm_after: Norm | None
    activation: Activation


class Block(NamedTuple):
    """One block; or, with the same places, the gradients of its tensors or whether they are wanted."""

    attention: Attention
    feed_forward: FeedForward


class Where(NamedTuple):
    """Where the tokens stand."""

    offsets: Tensor  # (S + 1,) int64, see `attention`
    cos: Tensor  # (N, R) float32, see `rope`
    sin: Tensor


def decoder_block(x: Tensor, block: Block, where: Where, frugal: bool = False) -> Tensor:
    """x + attention(x), called y, and of that y + feed_forward(y).

    Args:
        x: (..., D), of N tokens. All tensors are of one dtype that the native kernels take, low-rank factors excepted.
        frugal: keep less for backward, at the cost of computing the products with K = D again.
    """
    return _Block.apply(x, where, _map(block, lambda tensor: _TENSOR), frugal, *_tensors(block))


# ---- a tree of named tuples whose leaves may be tensors ----

_TENSOR = object()  # stands for a tensor in a tree that is kept without them


def _map(tree: Any, change: Callable[[Any], Any]) -> Any:
    """`tree` with what `change` makes of each tensor, or of each place of one, in order."""
    if isinstance(tree, tuple):
        parts = [_map(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return change(tree) if isinstance(tree, Tensor) or tree is _TENSOR else tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, tuple):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, Tensor):
        yield tree


def _filled(skeleton: Any, values: Sequence[Any]) -> Any:
    """`skeleton` with values in the places of its tensors."""
    left = iter(values)
    return _map(skeleton, lambda place: next(left))


def _at_tensors(skeleton: Any, tree: Any) -> Iterator[Any]:
    """What `tree` holds in the places where `skeleton` has tensors."""
    if isinstance(skeleton, tuple):
        for part, other in zip(skeleton, tree, strict=True):
            yield from _at_tensors(part, other)
    elif skeleton is _TENSOR:
        yield tree


def _any(tree: Any) -> bool:
    return any(map(_any, tree)) if isinstance(tree, tuple) else tree is True


# ---- products of one input ----


class Products(NamedTuple):
    """What several layers make of one input."""

    outputs: tuple[Tensor, ...]
    lows: tuple[Sequence[Tensor], ...]


def _products(x: Tensor, layers: tuple[Linear, ...], lows: Sequence[Any] | None = None) -> Products:
    made = [product(x, layer, None if lows is None else lows[i]) for i, layer in enumerate(layers)]
    outputs, kept = zip(*made)
    return Products(outputs, kept)


def _products_backward(
    grads: Sequence[Tensor], x: Callable[[], Tensor], layers: Any, lows: Any, wanted: Any, of_x: bool
) -> tuple[Tensor | None, tuple[Linear, ...]]:
    """The gradients of the input, if wanted, and of the layers. x: computes the input again."""
    grad_x, low_grads = None, []
    for grad, layer in zip(grads, layers):
        grad_x, of_lows = product_backward(grad, layer, of_x, grad_x)
        low_grads.append(of_lows)
    if not _any(wanted):
        return grad_x, wanted
    again = x()
    parts = zip(grads, layers, lows, low_grads, wanted)
    return grad_x, tuple(product_gradients(g, again, layer, low, of, want) for g, layer, low, of, want in parts)


def _split(outputs: Sequence[Tensor], widths: list[int]) -> Sequence[Tensor]:
    return outputs if len(outputs) > 1 else outputs[0].split(widths, dim=1)


# ---- the halves ----


class Turned(NamedTuple):
    """Queries, keys and values (N, heads, W): as they were made, and as they attend."""

    q_raw: Tensor
    k_raw: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    lows: Any


def _turned(x: Tensor, part: Attention, where: Where, lows: Any = None) -> Turned:
    """x: (N, D), normed."""
    made = _products(x, part.inputs, lows)
    widths = _head_widths(part)
    raw = [y.unflatten(1, (-1, part.head_width)) for y in _split(made.outputs, widths)]
    turned = []
    for y, norm in zip(raw, (part.query_norm, part.key_norm)):
        turned.append(rotated(y, where.cos, where.sin, out=y) if norm is None else rotated(normed(y, norm).y, *where[1:]))
    return Turned(raw[0], raw[1], *turned, raw[2], made.lows)


def _head_widths(part: Attention) -> list[int]:
    outputs, few = sum(len(layer.weight) for layer in part.inputs), part.kv_heads * part.head_width
    return [outputs - 2 * few, few, few]


def _added(x: Tensor, y: Tensor, norm_after: Norm | None, norm: Norm | None) -> tuple[Normed, Normed | None]:
    """x + y, or x + norm_after(y), and that normed for what follows."""
    after = None if norm_after is None else normed(y, norm_after)
    y = y if after is None else after.y
    return (Normed(y.add_(x), y, y, None) if norm is None else normed(x, norm, y)), after


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, where: Where, skeleton: Any, frugal: bool, *tensors: Tensor) -> Tensor:
        block: Block = _filled(skeleton, tensors)
        attention, feed_forward = block
        matrix = x.reshape(-1, x.shape[-1]).contiguous()
        first = normed(matrix, attention.norm)
        turned = _turned(first.y, attention, where)
        out, lse = attended(turned.q, turned.k, turned.v, where.offsets, attention.scores)
        mixed, mix_lows = product(out.flatten(1), attention.mix)
        second, after = _added(matrix, mixed, attention.norm_after, feed_forward.norm)
        gates = _products(second.y, feed_forward.inputs)
        inner = gated_forward(*_halves(gates.outputs), feed_forward.activation)
        result, last_lows = product(inner, feed_forward.mix)
        last, after_last = _added(second.total, result, feed_forward.norm_after, None)

        kept = {
            "x": matrix,
            "scale": first.scale,
            "out": out,
            "lse": lse,
            "mixed": after and after.total,
            "after_scale": after and after.scale,
            "y": second.total,
            "y_scale": second.scale,
            "result": after_last and after_last.total,
            "result_scale": after_last and after_last.scale,
        }
        ...
        return last.total.view(x.shape)
