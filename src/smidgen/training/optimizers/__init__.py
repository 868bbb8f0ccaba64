"""The optimizer by its name, and the learning rate, as a function of the step alone: nothing of it has to be saved.

`states` says what is kept for each parameter; the others move parameters and hold the states.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.errors import UsageError
from smidgen.recipe import TrainRecipe
from smidgen.training.optimizers.adafactor import Adafactor
from smidgen.training.optimizers.on_cuda import from_bitsandbytes
from smidgen.training.optimizers.sliced import RULES, Sliced
from smidgen.training.optimizers.states import Named, is_eight_bit, is_paged, layout_of, rule_of, trainable


class AdamW(Named, torch.optim.AdamW):
    """PyTorch's, which also moves parameters that are spread over processes."""


def check_optimizer(optim: str, device: torch.device) -> None:
    """Raises UsageError if the device lacks what the optimizer needs."""
    if device.type == "cuda" and _is_theirs(optim) and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"train.optim: '{optim}' on CUDA is bitsandbytes': pip install bitsandbytes, or take 'adamw'")
    if device.type not in ("cuda", "cpu") and is_paged(optim):
        raise UsageError(
            f"train.optim: '{optim}' pages states of a CPU or of CUDA, not of {device.type}; "
            f"take '{optim.removeprefix('paged_')}'"
        )


def _is_theirs(optim: str) -> bool:
    return is_eight_bit(optim) or is_paged(optim)


def make_optimizer(model: nn.Module, train: TrainRecipe, folder: Path) -> Named:
    """The optimizer that the recipe names, over the trainable parameters.

    Vectors (biases, norms) are not decayed. Every group carries the `names` of its parameters, which checkpoints use,
    and the `scale` of its learning rate.

    Args:
        folder: where paged states are on a CPU.

    Raises:
        UsageError: LoRA+ is asked for, and nothing would learn at its rate.
    """
    parameters = trainable(model)
    groups = _groups(parameters, train)
    rate, optim, layout = train.learning_rate, train.optim, layout_of(model, train.optim)
    if optim == "adamw":
        optimizer: Named = AdamW(groups, lr=rate, fused=True)
    elif optim == "adafactor":
        optimizer = Adafactor(groups, rate)
    elif _is_theirs(optim) and any(parameter.is_cuda for parameter in parameters.values()):
        optimizer = from_bitsandbytes(groups, rate, optim, layout)
    else:
        optimizer = Sliced(groups, rate, RULES[rule_of(optim)], folder if is_paged(optim) else None)
    optimizer.layout = layout
    return optimizer


def _groups(parameters: Mapping[str, nn.Parameter], train: TrainRecipe) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        vector, scale = parameter.ndim < 2, _scale(name, parameter, train)
        new = {"params": [], "names": [], "weight_decay": 0.0 if vector else train.weight_decay, "scale": scale}
        group = groups.setdefault((vector, scale), new)
        group["params"].append(parameter)
        group["names"].append(name)
    if train.loraplus_lr_ratio is not None and not any("lora_B" in name for name in parameters):
        raise UsageError("train.loraplus_lr_ratio: no B matrix of LoRA is trained; leave it out")
    return [groups[key] for key in sorted(groups)]


def _scale(name: str, parameter: nn.Parameter, train: TrainRecipe) -> float:
    """How many times the learning rate a parameter learns at: LoRA+ lets B matrices and vectors learn faster.

    The same parameters as in peft's `create_loraplus_optimizer`.
    Source: Hayou et al., LoRA+, https://arxiv.org/abs/2402.12354.
    """
    if train.loraplus_lr_ratio is None:
        return 1.0
    if "lora_embedding_" in name:
        return train.loraplus_lr_embedding / train.learning_rate
    return train.loraplus_lr_ratio if "lora_B" in name or parameter.ndim == 1 else 1.0


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
