"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint is a folder ``step-N`` with

- ``weights.safetensors``: the trainable parameters under their names in the model,
- ``optimizer.safetensors``: the optimizer's tensors as ``<parameter>.<what>``,
- ``random.safetensors``: the state of torch's generators, one for each device,
- ``state.json``: where the run stands, the generators of Python and numpy, the recipe.

It is written under another name, flushed to the disk and renamed: a folder called ``step-N`` is always complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from smidgen.errors import TrainingStopped, UsageError, raise_all
from smidgen.training.guards import check_finite

FORMAT = 1
WEIGHTS, OPTIMIZER, RANDOM, STATE = "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk, and its `state`: what `save` was given."""

    folder: Path
    step: int
    state: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put weights, optimizer and random generators back, in place.

        Raises:
            UsageError: the checkpoint's tensors are not those of the model.
        """
        weights = load_file(self.folder / WEIGHTS)
        own = trainable(model)
        problems = [f"only in the checkpoint: {name}" for name in weights.keys() - own.keys()]
        problems += [f"only in the model: {name}" for name in own.keys() - weights.keys()]
        problems += [
            f"{name}: shape {tuple(weights[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ]
        raise_all(UsageError, sorted(f"{self.folder}: {problem}" for problem in problems))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
        _restore_optimizer(optimizer, load_file(self.folder / OPTIMIZER))
        _restore_random(self.state["random"], load_file(self.folder / RANDOM))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write the checkpoint ``folder/step-N`` and remove all but the newest `keep`.

    Raises:
        TrainingStopped: a tensor is not finite, or the disk is full; earlier checkpoints are as they were.
    """
    weights = {name: parameter.detach().contiguous() for name, parameter in trainable(model).items()}
    check_finite(weights.items())
    generators, random_state = _random_state()
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if final.exists():
        return final
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / WEIGHTS)
        save_file(_optimizer_tensors(optimizer), partial / OPTIMIZER)
        save_file(generators, partial / RANDOM)
        document = {"format": FORMAT, "step": step, **state, "random": random_state}
        (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        os.replace(partial, final)
        _flush(folder)
    except (OSError, SafetensorError) as error:  # a full disk is either, by which library writes
        shutil.rmtree(partial, ignore_errors=True)
        kept = latest(folder)
        raise TrainingStopped(
            f"{final}: the checkpoint could not be written: {error}. "
            + (f"The one of step {kept.step} is intact." if kept else "There is no earlier one.")
        ) from error
    for old in _folders(folder)[keep:] if keep else []:
        leaving = old.with_name(f".{old.name}.partial")
        os.replace(old, leaving)
        shutil.rmtree(leaving)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder, if there is one.

    Raises:
        UsageError: it was written by another version of the format.
    """
    for path in _folders(folder):
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UsageError(f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}")
        return Checkpoint(path, state["step"], state)
    return None


def size(model: nn.Module) -> int:
    """The bytes of one checkpoint: the trainable parameters and AdamW's two moments of each."""
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in trainable(model).values())


def _folders(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first."""
    found = [
        (int(match[1]), path) for path in folder.glob("step-*") if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def _flush(path: Path) -> None:
    """Make a file or, where the system allows it, a folder's list of names durable."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    return {
        name: p for group in optimizer.param_groups for name, p in zip(group["names"], group["params"], strict=True)
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{what}": tensor.contiguous()
        for name, parameter in _named(optimizer).items()
        for what, tensor in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = _named(optimizer)
    optimizer.state.clear()
    for key, tensor in tensors.items():
        name, _, what = key.rpartition(".")
        optimizer.state[parameters[name]][what] = tensor.to(parameters[name].device)


def _random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """torch's generators as tensors; Python's and numpy's as JSON."""
    generators = {"cpu": torch.get_rng_state()}
    generators |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        generators["mps"] = torch.mps.get_rng_state()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return generators, {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def _restore_random(state: Mapping[str, Any], generators: Mapping[str, torch.Tensor]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    for device, generator in generators.items():
        if device == "cpu":
            torch.set_rng_state(generator)
        elif device == "mps":
            torch.mps.set_rng_state(generator)
        else:
            torch.cuda.set_rng_state(generator, device)
