"""Checkpoints: all that a run needs to go on as if it had never stopped, in safetensors and JSON.

A checkpoint is a folder ``step-N`` with

- ``weights.safetensors``: the trainable parameters under their names in the model,
- ``optimizer.safetensors``: the optimizer's states as ``<parameter>.<state>``,
- ``random.safetensors``: the states of torch's generators as ``<rank>.<device>``,
- ``state.json``: where the run stands, the generators of Python and numpy of each rank, the recipe.

It is written under another name, flushed to the disk and renamed: a folder called ``step-N`` is always complete.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from safetensors.torch import save as save_bytes
from torch import nn

from smidgen.errors import TrainingStopped, UsageError, raise_all
from smidgen.foreign import contained, read_object, shown
from smidgen.safetensors_header import read_header
from smidgen.training.guards import check_disk, check_finite
from smidgen.training.launch import rank
from smidgen.training.optimizers.states import Named, state_bytes, trainable
from smidgen.training.processes import collect, gather_bytes, is_first, spread_like, world
from smidgen.training.zero import Zero

FORMAT = 3
WEIGHTS, OPTIMIZER, RANDOM, STATE = "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"

# What a state must hold, beside what the run adds; the window is the loop's.
_FIELDS = {"step": int, "processes": int, "budget": int, "random": list, "window": dict, "scaler": dict}
_WINDOW = {"loss", "count", "tokens", "seconds", "metrics"}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on the disk, and its `state`: what `save` was given."""

    folder: Path
    step: int
    state: dict[str, Any]

    def restore(self, model: nn.Module, optimizer: Named | Zero) -> None:
        """Put weights, optimizer and random generators back, in place.

        Raises:
            UsageError: a file is damaged, or its tensors are not those of the model; nothing was changed then.
        """
        weights, states, generators = (_read(self.folder / name) for name in (WEIGHTS, OPTIMIZER, RANDOM))
        own = trainable(model)
        problems = [f"only in the checkpoint: {name}" for name in weights.keys() - own.keys()]
        problems += [f"only in the model: {name}" for name in own.keys() - weights.keys()]
        problems += [
            f"{name}: shape {tuple(weights[name].shape)} in the checkpoint, {tuple(own[name].shape)} in the model"
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        ]
        expected = {
            f"{name}.{what}": like for name, all_of in optimizer.layout.items() for what, like in all_of.items()
        }
        for key, state in states.items():
            if key not in expected or (state.shape, state.dtype) != (expected[key].shape, expected[key].dtype):
                problems.append(f"{OPTIMIZER}: '{shown(key)}' of shape {tuple(state.shape)} belongs to no parameter")
        begun = {key.rpartition(".")[0] for key in states}
        missing = [key for key in expected if key.rpartition(".")[0] in begun and key not in states]
        problems += [f"{OPTIMIZER}: '{key}' is missing" for key in missing]
        raise_all(UsageError, sorted(f"{self.folder}: {problem}" for problem in problems))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(spread_like(weights[name], parameter))
        optimizer.restore({key: spread_like(state, own[key.rpartition(".")[0]]) for key, state in states.items()})
        try:
            _restore_random(self.state["random"], generators)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
            raise UsageError(f"{self.folder}: the random generators are damaged: {shown(error)}") from error


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Named | Zero,
    state: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write the checkpoint ``folder/step-N`` and remove all but the newest `keep`.

    All processes call it together; the first one writes what it collects from them.

    Raises:
        TrainingStopped: a tensor is not finite, or the disk is full; earlier checkpoints are as they were.
    """
    weights, states = collect(trainable(model)), collect(optimizer.tensors())
    generators, random_states = _gather_random(next(model.parameters()).device)
    final, partial = folder / f"step-{step}", folder / f".step-{step}.partial"
    if final.exists() or not is_first():
        return final
    check_finite(weights.items())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        check_disk(folder, sum(tensor.nbytes for tensor in (*weights.values(), *states.values())))
        partial.mkdir(parents=True)
        save_file(weights, partial / WEIGHTS)
        save_file(states, partial / OPTIMIZER)
        save_file(generators, partial / RANDOM)
        document = {"format": FORMAT, "step": step, **state, "processes": world(), "random": random_states}
        (partial / STATE).write_text(json.dumps(document), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        os.replace(partial, final)
        _flush(folder)
    except (OSError, SafetensorError, UsageError) as error:  # a full disk is each of these, by who finds it
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
        UsageError: it was written by another version of the format, or is damaged.
    """
    for path in _folders(folder):
        state = read_object(contained(path, STATE, UsageError), UsageError)
        if state.get("format") != FORMAT:
            raise UsageError(f"{path}: checkpoint format {shown(state.get('format'))}, this version reads {FORMAT}")
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(state.get(name), kind)]
        if not wrong and not _is_window(state["window"]):
            wrong.append("window")
        if wrong:
            raise UsageError(f"{path / STATE}: damaged: {', '.join(wrong)} missing or of a wrong kind")
        return Checkpoint(path, state["step"], state)
    return None


def _is_window(window: dict[str, Any]) -> bool:
    if window.keys() != _WINDOW or not isinstance(window["metrics"], dict):
        return False
    pairs = window["metrics"].values()
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return False
    numbers = [value for name, value in window.items() if name != "metrics"]
    return all(map(_is_number, [*numbers, *(number for pair in pairs for number in pair)]))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> dict[str, torch.Tensor]:
    read_header(contained(path.parent, path.name, UsageError), UsageError)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file: {error}") from error


def size(model: nn.Module, optim: str) -> int:
    """The bytes of one checkpoint: the trainable parameters and their states."""
    return sum(parameter.nbytes for parameter in trainable(model).values()) + state_bytes(model, optim)


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


def _gather_random(device: torch.device) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """The generators of all processes: torch's as ``<rank>.<device>``, and Python's and numpy's by rank."""
    own, rest = _random_state()
    tensors = [load(data) for data in gather_bytes(save_bytes(own), device)]
    generators = {f"{rank}.{name}": state for rank, states in enumerate(tensors) for name, state in states.items()}
    return generators, [json.loads(data) for data in gather_bytes(json.dumps(rest).encode(), device)]


def _random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """This process's generators: torch's as tensors; Python's and numpy's as JSON."""
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        generators["mps"] = torch.mps.get_rng_state()
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return generators, {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def _restore_random(states: Sequence[Mapping[str, Any]], generators: Mapping[str, torch.Tensor]) -> None:
    state = states[rank()]
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    restorers = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state, "mps": torch.mps.set_rng_state}
    for name, generator in generators.items():
        number, _, device = name.partition(".")
        if int(number) == rank():
            restorers[device](generator)
