"""The optimizer and the learning rate, as a function of the step alone: nothing of it has to be saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from smidgen.recipe import TrainRecipe


def make_optimizer(named: Iterable[tuple[str, nn.Parameter]], train: TrainRecipe) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters, one group each for those with and without weight decay.

    Vectors (biases, norms) are not decayed. Every group carries the `names` of its parameters, which checkpoints use.
    Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101.
    """
    groups: list[dict] = [
        {"params": [], "names": [], "weight_decay": train.weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in named:
        group = groups[parameter.ndim < 2]
        group["params"].append(parameter)
        group["names"].append(name)
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)


def updates_of(train: TrainRecipe, rows: int) -> int:
    """How many updates a run over so many rows makes."""
    return train.max_steps or math.ceil(train.epochs * math.ceil(rows / train.batch_size))


def warmup_steps(train: TrainRecipe, total: int) -> int:
    """In how many of the `total` updates the learning rate rises; none for the plain constant schedule."""
    return 0 if train.lr_scheduler_type == "constant" else math.ceil(train.warmup_ratio * total)


def learning_rate(train: TrainRecipe, step: int, total: int) -> float:
    """The learning rate of update `step` (0 is the first) of `total`.

    It rises in equal steps, the first above zero, then stays or falls; it would reach zero one update after the last.
    """
    warmup = warmup_steps(train, total)
    if step < warmup:
        return train.learning_rate * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return train.learning_rate * SCHEDULES[train.lr_scheduler_type](done)


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "constant_with_warmup": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
