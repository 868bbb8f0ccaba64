"""Losses of reward models, against TRL's and the formulas written out."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from smidgen.losses.reward import bradley_terry, step_rewards


@pytest.mark.parametrize("margin", [None, torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("centering", [0.0, 0.01])
def test_bradley_terry_and_its_gradient_are_trls(margin, centering):
    RewardTrainer = pytest.importorskip("trl").RewardTrainer

    rewards = torch.tensor([1.0, -2.0, 0.3, 0.4, 1.5, -30.0], requires_grad=True)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(6, 2), **({} if margin is None else {"margin": margin})}
    outputs = SimpleNamespace(logits=rewards[:, None])
    theirs = RewardTrainer.compute_loss(trainer, lambda **inputs: outputs, inputs)
    options = {} if margin is None else {"margin": margin}
    ours = bradley_terry(*rewards.chunk(2), centering=centering, **options)
    assert ours.shape == (3,)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(loss, rewards, retain_graph=True)[0] for loss in (ours.mean(), theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_step_rewards_are_the_cross_entropy_of_two_classes():
    scores = torch.tensor([0.0, 2.0, -40.0], dtype=torch.float64)
    labels = torch.tensor([True, False, True])
    two = torch.stack([torch.zeros(3), scores], dim=1)
    expected = torch.nn.functional.cross_entropy(two, labels.long(), reduction="none")
    torch.testing.assert_close(step_rewards(scores, labels), expected)
    soft = step_rewards(scores, torch.tensor([0.25, 0.25, 0.25]))
    torch.testing.assert_close(soft, 0.25 * -two.log_softmax(1)[:, 1] + 0.75 * -two.log_softmax(1)[:, 0])
