"""Cross-entropy of a linear head, a chunk of rows at a time: the logits of all rows never exist at once.

Letters: N rows, D width, V vocabulary.

The gradient of the logits is taken in forward, in the memory of the logits, and only its product with the weight (N, D)
is kept: each row of it is later multiplied by the gradient of the row's loss. Where the weight or the bias are trained
too, that gradient is needed first, and the logits are computed again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from smidgen.errors import UsageError
from smidgen.kernels.native import Kernel, autocast, eager, takes

IGNORE = -100  # the target of a row without loss
_CHUNK_BYTES = 32 * 2**20  # logits at a time: beyond it products get no faster
_SMALLEST_CHUNK = 64  # rows; with fewer, reading the weight takes longer than multiplying by it
_native = Kernel("cross_entropy", "pnpppnnffffn")


@dataclass(frozen=True)
class _Shape:
    """How a row of logits becomes a loss."""

    chunk: int
    smoothing: float
    softcap: float | None
    logit_scale: float
    z_loss: float


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of each row, from the hidden states that the head is applied to.

    With z = logit_scale (W h + b), capped to softcap tanh(z / softcap), and lse = log sum exp z, the loss of target t
    is lse - (1 - label_smoothing) z_t - label_smoothing mean(z) + z_loss lse^2.

    Args:
        hidden: (N, D); give only rows with loss: the others are left out, at the cost of a copy.
        weight: (V, D), of the type of `hidden`; under autocast both are taken in its type.
        targets: (N,) int64, from 0 to below V, or -100 for a row without loss.
        bias: (V,).
        chunk: how many rows get logits at a time; by default as many as fill 32 MB.
        label_smoothing: the share of the target's probability that is spread over the vocabulary.
        softcap: the largest logit (Gemma 2: 30).
        logit_scale: a factor on the logits (Cohere, Granite: 1 / logits_scaling).
        z_loss: the weight of lse^2 (https://arxiv.org/abs/2204.02311, section 5).

    Returns:
        (N,) float32, not averaged; 0 where the target is -100.

    Raises:
        UsageError: a target is outside of the vocabulary.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1]:
        raise UsageError(f"hidden must be (N, D) and targets (N,), got {tuple(hidden.shape)}, {tuple(targets.shape)}")
    hidden, weight, bias = autocast(hidden), autocast(weight), None if bias is None else autocast(bias)
    size = weight.shape[0]
    rows = max(_SMALLEST_CHUNK, _CHUNK_BYTES // (size * hidden.element_size()))
    how = _Shape(chunk or rows, label_smoothing, softcap, logit_scale, z_loss)
    learned = targets != IGNORE
    if not torch.compiler.is_compiling() and bool((((targets < 0) & learned) | (targets >= size)).any()):
        raise UsageError(f"targets must be below {size:,} or {IGNORE}, got {targets.min()} to {targets.max()}")
    if not eager(hidden, weight, bias):
        return cross_entropy_reference(hidden, weight, targets, bias, label_smoothing, softcap, logit_scale, z_loss)
    if bool(learned.all()):
        return _LinearCrossEntropy.apply(hidden, weight, bias, targets.contiguous(), how)
    place = learned.nonzero().squeeze(1)
    losses = _LinearCrossEntropy.apply(hidden[place], weight, bias, targets[place], how)
    return losses.new_zeros(hidden.shape[0]).index_copy(0, place, losses)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The log-probability (N,) of each target in float32, as `linear_cross_entropy` computes it; 0 for target -100."""
    return -linear_cross_entropy(hidden, weight, targets, bias, chunk, softcap=softcap, logit_scale=logit_scale)


def cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
) -> Tensor:
    """`linear_cross_entropy` in plain PyTorch, with the logits of all rows."""
    z = functional.linear(hidden, weight, bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = z.logsumexp(-1)
    learned = targets != IGNORE
    of_target = z.gather(1, targets.where(learned, 0)[:, None]).squeeze(1)
    losses = lse - (1 - label_smoothing) * of_target - label_smoothing * z.mean(-1) + z_loss * lse.square()
    return losses.where(learned, 0)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _Shape) -> Iterator[tuple[slice, Tensor]]:
    """The logits of one chunk of rows after the other, in one buffer."""
    buffer = hidden.new_empty(min(how.chunk, hidden.shape[0]), weight.shape[0])
    for start in range(0, hidden.shape[0], how.chunk):
        part = slice(start, min(start + how.chunk, hidden.shape[0]))
        logits = buffer[: part.stop - start]
        if bias is None:
            torch.mm(hidden[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[part], weight.t(), out=logits)
        yield part, logits


def _softmax(
    logits: Tensor, targets: Tensor, row_grad: Tensor | None, losses: Tensor | None, how: _Shape, grad: bool
) -> None:
    """Write the losses of a chunk, and the gradient of its logits over them."""
    if not takes(logits):
        return _softmax_reference(logits, targets, row_grad, losses, how, grad)
    settings = (how.logit_scale, how.softcap or 0.0, how.smoothing, how.z_loss)
    _native(logits.dtype, logits, logits.stride(0), targets, row_grad, losses, *logits.shape, *settings, grad)


def _softmax_reference(
    logits: Tensor, targets: Tensor, row_grad: Tensor | None, losses: Tensor | None, how: _Shape, grad: bool
) -> None:
    """`_softmax` in plain PyTorch."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * how.logit_scale
    if how.softcap is not None:
        z = how.softcap * torch.tanh(z / how.softcap)
    lse, of_target = z.logsumexp(-1, keepdim=True), z.gather(1, targets[:, None])
    if losses is not None:
        mean = z.mean(-1, keepdim=True)
        loss = lse - (1 - how.smoothing) * of_target - how.smoothing * mean + how.z_loss * lse.square()
        losses.copy_(loss.squeeze(1))
    if not grad:
        return
    slope = 1.0 if how.softcap is None else 1 - (z / how.softcap).square()
    z.sub_(lse).exp_().mul_(1 + 2 * how.z_loss * lse).sub_(how.smoothing / z.shape[1])
    z.scatter_add_(1, targets[:, None], torch.full_like(of_target, how.smoothing - 1))
    z.mul_(slope).mul_(how.logit_scale if row_grad is None else how.logit_scale * row_grad[:, None])
    logits.copy_(z)


def _in_float32(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, device=like.device)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _Shape) -> Tensor:
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        ctx.again = of_weight or of_bias
        ctx.how = how
        early = of_hidden and not ctx.again
        losses = _in_float32(hidden, hidden.shape[0])
        grad = torch.empty_like(hidden) if early else None
        for part, logits in _chunks(hidden, weight, bias, how):
            _softmax(logits, targets[part], None, losses[part], how, early)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
        ctx.save_for_backward(*((hidden, weight, bias, targets) if ctx.again else (grad,)))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, row_grad: Tensor):
        if not ctx.again:
            (grad,) = ctx.saved_tensors
            return (row_grad[:, None] * grad).to(grad.dtype), None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        row_grad = row_grad.contiguous()
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad = torch.empty_like(hidden) if of_hidden else None
        grad_weight = _in_float32(hidden, *weight.shape) if of_weight else None
        grad_bias = _in_float32(hidden, len(weight)) if of_bias else None
        for part, logits in _chunks(hidden, weight, bias, ctx.how):
            _softmax(logits, targets[part], row_grad[part], None, ctx.how, True)
            if grad is not None:
                torch.mm(logits, weight, out=grad[part])
            if grad_weight is not None:
                grad_weight += logits.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        sums = (None if s is None else s.to(hidden.dtype) for s in (grad_weight, grad_bias))
        return grad, *sums, None, None
