"""What the models say of answers, and what is made of it before a loss sees it.

Letters: B answers, N tokens of all answers. Log-probabilities are in nats, float32 or wider.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Answers(NamedTuple):
    """What the models say of B answers.

    policy: (B,) log-probability of each answer under the policy, summed over its tokens.
    tokens: (B,) how many tokens it has, at least 1.
    reference: (B,) as policy, under the reference, without gradient; None: there is no reference.
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None


def log_prob(answers: Answers) -> Tensor:
    """Log-probability under the policy, (B,)."""
    return answers.policy


def log_prob_per_token(answers: Answers) -> Tensor:
    """Log-probability under the policy, mean over the answer's tokens, (B,)."""
    return answers.policy / answers.tokens


def log_ratio(answers: Answers) -> Tensor:
    """r = log policy - log reference, (B,): DPO's implicit reward, but for the factor beta."""
    if answers.reference is None:
        raise ValueError("log_ratio: these answers have no reference log-probabilities")
    return answers.policy - answers.reference


def log_odds(answers: Answers) -> Tensor:
    """log(p / (1 - p)) of the mean probability p of a token, (B,); p stays 1e-7 below 1, where odds are infinite."""
    x = log_prob_per_token(answers).clamp(max=-1e-7)
    log_rest = torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    return x - log_rest


def sum_tokens(logps: Tensor, tokens: Tensor, other: Tensor | None = None, *, ld_alpha: float = 1.0) -> Tensor:
    """Sum the log-probabilities of tokens over each answer; with `other`, desensitised to length (LD-DPO).

    LD-DPO counts the tokens beyond the shorter answer of a pair by `ld_alpha` only. https://arxiv.org/abs/2409.06411

    Args:
        logps: (N,) of all tokens, answer after answer.
        tokens: (B,) int64, how many belong to each.
        other: (B,) int64, how many tokens the other answer of the pair has.

    Returns:
        (B,)
    """
    answer = torch.repeat_interleave(torch.arange(len(tokens), device=tokens.device), tokens)
    if other is not None:
        place = torch.arange(len(logps), device=tokens.device) - (tokens.cumsum(0) - tokens)[answer]
        logps = torch.where(place < other[answer], logps, ld_alpha * logps)
    return logps.new_zeros(len(tokens)).index_add(0, answer, logps)


def per_token(answers: Answers) -> Answers:
    """The answers with mean log-probabilities of a token in place of sums."""
    policy, tokens, reference = answers
    return Answers(policy / tokens, tokens, None if reference is None else reference / tokens)


def _alpha_scores(r: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:  # the limit
        return r
    return torch.expm1(((alpha - 1) * r).clamp(max=80)) / (alpha - 1)  # e^80 is a float32 still


# Name -> f'(e^r): what takes the place of r.
DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda r, alpha: r,
    "forward_kl": lambda r, alpha: -torch.expm1(-r),
    "js_divergence": lambda r, alpha: math.log(2) + logsigmoid(r),
    "alpha_divergence": _alpha_scores,
}


def diverge(answers: Answers, divergence: str, alpha: float) -> Answers:
    """The answers with f'(e^r) in place of r: f-DPO, which holds the policy by another divergence than reverse KL.

    `alpha` is that of the alpha-divergence: 1 is reverse KL, 0 forward KL. https://arxiv.org/abs/2309.16240
    """
    scores = DIVERGENCES[divergence](log_ratio(answers), alpha)
    return Answers(scores, answers.tokens, torch.zeros_like(scores))
