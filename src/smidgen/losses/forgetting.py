"""What it costs to move away from what a model was. Letters: N tokens, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def distance(now: Sequence[Tensor], start: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Tensor:
    """Half the squared distance of parameters from their start: 1/2 sum_i w_i (now_i - start_i)^2.

    With the Fisher information as weights it is the penalty of Elastic Weight Consolidation
    (https://arxiv.org/abs/1612.00796), with none L2-SP's (https://arxiv.org/abs/1802.01483).

    Args:
        now, start, weights: tensors of the same shapes; the sum is taken in float32 or wider.

    Returns:
        A scalar, with gradient for `now`.
    """
    parts = []
    for at, (tensor, before) in enumerate(zip(now, start, strict=True)):
        moved = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) - before).square()
        parts.append((moved if weights is None else weights[at] * moved).sum() / 2)
    return torch.stack(parts).sum()


def token_kl(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference, policy) of the next token, in nats: sum_v p_v (log p_v - log q_v).

    Args:
        reference: (N, V) logits of p. logits: (N, V) logits of q.

    Returns:
        (N,) float32 or wider, not averaged.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, q = (each.to(wide).log_softmax(1) for each in (reference, logits))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
