"""Token cross-entropy and its mean, against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from smidgen.losses.lm import token_cross_entropy
from smidgen.losses.reduce import mean_share


def test_token_cross_entropy_is_the_negative_log_probability():
    logits = torch.tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    losses = token_cross_entropy(logits, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([-math.log(3 / 4), math.log(2.0)], abs=1e-6)


def test_token_cross_entropy_sums_in_float32():
    logits = torch.zeros(1, 5000, dtype=torch.bfloat16)
    losses = token_cross_entropy(logits, torch.tensor([7]))
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(math.log(5000), abs=1e-5)


def test_shares_of_unequal_pieces_add_up_to_the_mean():
    values = torch.tensor([1.0, 2.0, 6.0, 7.0], requires_grad=True)
    shares = [mean_share(piece, 4) for piece in (values[:1], values[1:])]
    sum(shares).backward()
    assert sum(share.item() for share in shares) == 4.0
    assert values.grad.tolist() == [0.25] * 4
