"""The learning rate over a run, and who is decayed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from smidgen.training.optimizers import learning_rate, make_optimizer, updates_of
from tests.conftest import tiny_llama
from tests.training.conftest import TRAIN

BASE = replace(TRAIN, learning_rate=1.0, warmup_ratio=0.2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, *(1 - k / 8 for k in range(8))]),
        ("cosine", [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))]),
    ],
)
def test_learning_rate(name, expected):
    train = replace(BASE, lr_scheduler_type=name)
    assert [learning_rate(train, step, 10) for step in range(10)] == pytest.approx(expected)


def test_vectors_are_not_decayed():
    model = tiny_llama()
    optimizer = make_optimizer(model.named_parameters(), replace(BASE, weight_decay=0.1))
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decay == {name: 0.1 if parameter.ndim > 1 else 0.0 for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("train", "updates"), [({"max_steps": 7}, 7), ({"epochs": 2.5, "max_steps": None}, 8)])
def test_updates_of_a_run(train, updates):
    assert updates_of(replace(TRAIN, **train), rows=10) == updates
