"""Losses of language modelling. Letters: N supervised tokens, V vocabulary."""

from __future__ import annotations

import torch
from torch.nn import functional


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-probability of each target token, in nats.

    Args:
        logits: (N, V), any floating type; the sum over V is taken in float32 or wider.
        targets: (N,) int64.

    Returns:
        (N,) of that type, not averaged: `losses.reduce` says how.
    """
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none"
    )
