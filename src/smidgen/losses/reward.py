"""Losses of reward models. Letters: B pairs, S steps of all answers."""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, *, margin: torch.Tensor | float = 0.0, centering: float = 0.0
) -> torch.Tensor:
    """-log s(R_w - R_l - margin) + centering (R_w + R_l)^2, with s the logistic function.

    Bradley and Terry 1952. The margin says how much better the chosen answer is: https://arxiv.org/abs/2307.09288. The
    second term holds rewards around 0, which pairs leave open: https://arxiv.org/abs/2312.09244.

    Args:
        chosen, rejected: (B,) rewards.
        margin: (B,), or one for all.

    Returns:
        (B,)
    """
    return -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2


def step_rewards(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each step of a solution: -log s(score) where it is right, -log s(-score) where it is wrong.

    https://arxiv.org/abs/2305.20050

    Args:
        scores: (S,) the model's logit that the step is right, read at its last token.
        labels: (S,) bool, or the probability that the step is right.

    Returns:
        (S,)
    """
    return binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
