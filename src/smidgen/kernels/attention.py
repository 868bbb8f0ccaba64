"""Causal attention over packed segments of any length, with memory that grows with the tokens, not their square.

Letters: T tokens, S segments, H query heads, K key and value heads (H is a multiple of K), D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smidgen.errors import UsageError, raise_all
from smidgen.kernels.native import Kernel, takes

_WIDEST = 256  # of a head, in the native kernel
_forward = Kernel("attention", "pnnpnnpnn" + "pnnnnnff" + "pnnp")
_backward = Kernel("attention_backward", "pnnpnnpnn" + "pnnnnnff" + "pnnppnn" + "pnnpnnpnn")


class Scores(NamedTuple):
    """How scores are made of products."""

    scale: float
    window: int | None
    softcap: float | None


class Spread(NamedTuple):
    """Tokens that attend in several segments. Letters: E places of tokens in segments.

    tokens: (E,) int64, the one at each place. kept: (T,) int64, the place of each whose answer counts, its first.
    repeated: of tokens with n places each, their indices, (M,) int64, and these places, (n, M); for all n above 1.
    """

    tokens: Tensor
    kept: Tensor
    repeated: tuple[tuple[Tensor, Tensor], ...]

    def summed(self, x: Tensor, out: Tensor) -> None:
        """Write into `out` (T, ...) the sums of x (E, ...) over the places of each token."""
        torch.index_select(x, 0, self.kept, out=out) if out.is_contiguous() else out.copy_(x.index_select(0, self.kept))
        for tokens, places in self.repeated:
            every = x.index_select(0, places.flatten())
            out.index_copy_(0, tokens, every.unflatten(0, places.shape).sum(0))


def spread_out(x: Tensor, spread: Spread) -> Tensor:
    """x (T, ...) at the places of its tokens, (E, ...)."""
    return _SpreadOut.apply(x, spread)


class _SpreadOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, spread: Spread) -> Tensor:
        ctx.spread, ctx.shape = spread, x.shape
        return x.index_select(0, spread.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Any:
        out = grad.new_empty(ctx.shape)
        ctx.spread.summed(grad, out)
        return out, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v within each segment, where a token sees itself and those before it.

    Args:
        q: (T, H, D). k, v: (T, K, D); head h of q meets head h // (H / K) of k and v. Views of one tensor are read in
            place if their last dimension is dense.
        offsets: (S + 1,) int32 or int64 on the CPU: segment s is tokens offsets[s] up to offsets[s + 1]; it starts at 0
            and ends at T. Segments may be empty.
        scale: of the products; by default 1 / sqrt(D).
        window: a token sees this many, itself counted (transformers' `sliding_window`).
        softcap: scores become softcap tanh(scores / softcap) (Gemma 2).

    Returns:
        The output (T, H, D), contiguous, and log sum exp of the scores, (T, H) float32, which takes no gradient.

    Raises:
        UsageError: shapes or offsets do not fit.
    """
    how = Scores(scale if scale is not None else q.shape[-1] ** -0.5, window, softcap)
    _check(q, k, v, offsets, how.scale, window)
    if q.shape[-1] > _WIDEST or not takes(q, k, v):
        return attention_reference(q, k, v, offsets, how.scale, window, softcap)
    return _Attention.apply(q, k, v, offsets.long().contiguous(), how)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention` in plain PyTorch, one segment after the other."""
    group = q.shape[1] // k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [q[:0]], [q.new_zeros((0, q.shape[1]), dtype=wide)]
    bounds = offsets.tolist()
    for start, end in pairwise(bounds):
        queries = q[start:end].transpose(0, 1)  # (H, n, D)
        keys, values = (x[start:end].transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))
        scores = (queries @ keys.transpose(1, 2)).to(wide) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(end - start, device=q.device)
        distance = place[:, None] - place
        hidden = (distance < 0) | (distance >= window) if window else distance < 0
        scores = scores.masked_fill(hidden, float("-inf"))
        outs.append((scores.softmax(-1).to(q.dtype) @ values).transpose(0, 1))
        lses.append(scores.logsumexp(-1).transpose(0, 1))
    return torch.cat(outs), torch.cat(lses).detach()


def _check(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, window: int | None) -> None:
    problems = []
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        problems.append(f"attention: q must be (T, H, D), k and v (T, K, D), got {shapes}")
    elif q.shape[1] % k.shape[1]:
        problems.append(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if offsets.dim() != 1 or len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(q) or (offsets.diff() < 0).any():
        problems.append(f"attention: offsets must rise from 0 to {len(q)} (tokens), got {offsets.tolist()}")
    if scale <= 0:
        problems.append(f"attention: scale must be above 0, got {scale}")
    if window is not None and window < 1:
        problems.append(f"attention: window must be at least 1, got {window}")
    raise_all(UsageError, problems)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[Tensor, int, int]:
    return x, x.stride(0), x.stride(1)


def _settings(q: Tensor, k: Tensor, offsets: Tensor, how: Scores) -> tuple[Tensor | int | float, ...]:
    sizes = (len(offsets) - 1, q.shape[1], k.shape[1], q.shape[2])
    return offsets, *sizes, how.window or 0, how.scale, how.softcap or 0.0


def attended(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, how: Scores) -> tuple[Tensor, Tensor]:
    """The native `attention` without autograd; the last dimensions are dense, `offsets` are int64."""
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2])
    _forward(q.dtype, *_place(q), *_place(k), *_place(v), *_settings(q, k, offsets, how), *_place(out), lse)
    return out, lse


def attended_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    how: Scores,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    into: Sequence[Tensor],
) -> None:
    """Write the gradients of q, k and v `into` tensors of their shapes; `out`, `lse`: what `attended` answered."""
    grad = _dense(grad)
    _backward(
        q.dtype,
        *(*_place(q), *_place(k), *_place(v), *_settings(q, k, offsets, how)),
        *(*_place(out), lse, *_place(grad), *(place for x in into for place in _place(x))),
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, how: Scores):
        q, k, v = (_dense(x) for x in (q, k, v))
        out, lse = attended(q, k, v, offsets, how)
        ctx.save_for_backward(q, k, v, offsets, out, lse)
        ctx.how = how
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):
        q, k, v, offsets, out, lse = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        attended_backward(q, k, v, offsets, ctx.how, out, lse, grad, grads)
        return *grads, None, None
