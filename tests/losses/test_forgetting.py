"""What it costs to move away from the start, against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from smidgen.losses.forgetting import distance, token_kl

SHAPES = [(3, 4), (5,), ()]


def drawn(seed: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES]


@pytest.mark.parametrize("weighed", [False, True], ids=["l2", "ewc"])
def test_the_distance_and_its_gradient_are_the_formulas(weighed):
    now, start = drawn(0), drawn(1)
    fisher = [tensor.square() for tensor in drawn(2)] if weighed else None
    value = distance([tensor.requires_grad_() for tensor in now], start, fisher)
    value.backward()
    weights = fisher or [torch.ones_like(tensor) for tensor in start]
    expected = 0.0
    for tensor, before, weight in zip(now, start, weights, strict=True):
        moves = zip(tensor.flatten().tolist(), before.flatten().tolist(), weight.flatten().tolist(), strict=True)
        expected += sum(0.5 * f * (a - b) ** 2 for a, b, f in moves)
        torch.testing.assert_close(tensor.grad, weight * (tensor.detach() - before), rtol=1e-6, atol=1e-12)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_small_steps_of_16_bits_are_not_lost():
    start = torch.full((1000,), 256.0, dtype=torch.bfloat16)
    now = start + 2  # the next number; the sum of the squares has more digits than 16 bits hold
    assert distance([now], [start]).item() == 2000


def test_the_kl_and_its_gradient_are_those_of_the_distributions():
    random = torch.Generator().manual_seed(0)
    reference, logits = (3 * torch.randn(6, 11, generator=random, dtype=torch.float64) for _ in range(2))
    found = token_kl(reference, logits.requires_grad_())
    assert found.shape == (6,)
    torch.testing.assert_close(found, kl_divergence(Categorical(logits=reference), Categorical(logits=logits)))
    found.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - reference.softmax(1), rtol=1e-6, atol=1e-12)
    assert token_kl(logits.detach() + 3, logits.detach()).abs().max() < 1e-12
