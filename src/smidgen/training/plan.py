"""What a run will need, before it begins: memory and time.

A forward and backward pass over a few rows follows every tensor that lives during it, and is timed; a short one is run
again to take its time. Both are scaled by the tokens of the largest micro-batch and of all epochs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from smidgen.data.packing import Batch
from smidgen.models.load import free_memory
from smidgen.models.scores import vocabulary_size
from smidgen.recipe import TrainRecipe
from smidgen.training.memory import give_back, held
from smidgen.training.objectives import Collating, Objective
from smidgen.training.optimizers.states import held_bytes

PARTS = ("weights", "trained", "gradients", "optimizer", "activations", "logits", "libraries")
PROBE_TOKENS = 512
REPEATED_BELOW = 1.0  # seconds: in a longer pass the first time weighs little
# Wider micro-batches gain little speed: see docs/training.md for the measurements.
PREFERRED_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 8192}


@dataclass(frozen=True)
class Probe:
    """What one pass over `tokens` tokens took: bytes of activations and logits at its peak, and seconds.

    held: the bytes that the process held on the device before.
    """

    tokens: int
    activations: int
    logits: int
    seconds: float
    held: int


@dataclass(frozen=True)
class Forecast:
    """Bytes that a run will hold at its peak, by what they are for, and the time of its updates.

    libraries: all that is held beside the model before the first step: on a CPU code, tokenizer and
        rows; on a GPU what its driver takes.
    loaded: how much of all that is held already. free: what the device can give beside it.
    rate: seconds for each token; None: not known. tokens: of all updates; None: not known.
    remedy: a change of the recipe that needs less.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    libraries: int
    loaded: int
    free: int
    micro_batch_tokens: int
    rate: float | None
    tokens: float | None
    remedy: str = ""

    def bytes(self) -> dict[str, int]:
        """What is counted, by name."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def peak(self) -> int:
        return sum(self.bytes().values())

    @property
    def missing(self) -> int:
        """What is not held yet."""
        return self.peak - self.loaded

    @property
    def fits(self) -> bool:
        return self.missing <= self.free

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None or self.tokens is None else self.rate * self.tokens

    def lines(self) -> list[str]:
        """The forecast for people; where it does not fit, with the smallest change that does."""
        parts = "  ".join(f"{name} {size_text(size)}" for name, size in self.bytes().items())
        fits = (
            f"fits: {'yes' if self.fits else 'no'} (needs {size_text(self.missing)} more, {size_text(self.free)} free)"
        )
        return [
            f"memory: {parts}",
            f"peak: {size_text(self.peak)} at {self.micro_batch_tokens:,} tokens at once; "
            + (fits if self.fits else f"{fits}. Smallest change: {self.remedy}"),
            f"time: about {duration(self.seconds)}",
        ]


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is active.

    `peak` is what lived when most did: activations, and logits: tensors whose last dimension is `vocabulary`.
    """

    def __init__(self, vocabulary: int):
        super().__init__()
        self._vocabulary = vocabulary
        self._seen = WeakIdKeyDictionary(ref_type=weakref.ref)  # type: ignore[arg-type]
        self._now = [0, 0]
        self.peak = (0, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._seen.setdefault(tensor.untyped_storage(), None)  # it was there before: not ours to count
        answer = func(*args, **(kwargs or {}))
        for tensor in _tensors(answer):
            self._count(tensor)
        return answer

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        kind, size = int(tensor.shape[-1:] == (self._vocabulary,)), storage.nbytes()
        self._seen[storage] = weakref.finalize(storage, self._release, kind, size)
        self._now[kind] += size
        if sum(self._now) > sum(self.peak):
            self.peak = (self._now[0], self._now[1])

    def _release(self, kind: int, size: int) -> None:
        self._now[kind] -= size


def probe(
    model: nn.Module,
    objective: Objective,
    rows: Any,
    how: Collating,
    autocast: torch.dtype | None,
    tokens: int = PROBE_TOKENS,
) -> Probe:
    """Run forward and backward over some `tokens`: the longest row that is learned from, repeated.

    Gradients and generators stay untouched.
    """
    device, row = next(model.parameters()).device, int(np.argmax(rows.lengths * (rows.supervised_counts > 0)))
    longest = int(rows.lengths[row])
    alike = [row] * max(1, tokens // longest)
    batch = objective.collate(rows, alike, replace(how, token_budget=max(tokens, longest)))[0].to(device)
    give_back()
    before = held(device)

    was_training = model.training
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), empty_gradients(model):
        with LiveBytes(vocabulary_size(model)) as live:
            seconds = one_pass(model, objective, batch, autocast)
        if seconds < REPEATED_BELOW:
            seconds = one_pass(model, objective, batch, autocast)
    model.train(was_training)
    return Probe(batch.input_ids.numel(), *live.peak, seconds, before)


def one_pass(model: nn.Module, objective: Objective, batch: Batch, autocast: torch.dtype | None) -> float:
    """Run forward and backward over a batch; answer the seconds."""
    begun = time.perf_counter()
    with torch.autocast(batch.input_ids.device.type, autocast, enabled=autocast is not None):
        with torch.no_grad():
            (batch,) = objective.prepare(model, [batch])
        loss = objective.loss(model, batch).values.sum()
    loss.backward()
    loss.item()
    return time.perf_counter() - begun


@contextmanager
def empty_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients are there inside the block, so that they do not count as activations; none is left after it."""
    learners = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learners:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for parameter in learners:
            parameter.grad = None


def at_once(rows: Any, how: Collating, batch_size: int) -> int:
    """The most tokens that a micro-batch may have."""
    longest = int(rows.lengths.max())
    most = max(longest, min(how.token_budget, batch_size * longest))
    return most if how.packing else most - most % longest


def forecast(model: nn.Module, taken: Probe, rows: Any, how: Collating, train: TrainRecipe, updates: int) -> Forecast:
    """Scale a probe to a whole run of `updates` updates."""
    tokens = at_once(rows, how, train.batch_size)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    all_bytes = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    libraries = max(0, taken.held - all_bytes)
    return Forecast(
        weights=all_bytes - trained_bytes,
        trained=trained_bytes,
        gradients=trained_bytes,
        optimizer=held_bytes(model, train.optim),
        activations=taken.activations * tokens // taken.tokens,
        logits=taken.logits * tokens // taken.tokens,
        libraries=libraries,
        loaded=all_bytes + libraries,
        free=free_memory(next(model.parameters()).device),
        micro_batch_tokens=tokens,
        rate=taken.seconds / taken.tokens,
        tokens=float(rows.lengths.mean()) * train.batch_size * updates,
    )


def choose_budget(
    model: nn.Module, taken: Probe, rows: Any, how: Collating, train: TrainRecipe, updates: int
) -> Collating:
    """Halve the token budget until the forecast fits, but not below the longest row."""
    while how.token_budget > rows.lengths.max() and not forecast(model, taken, rows, how, train, updates).fits:
        how = replace(how, token_budget=how.token_budget // 2)
    return how


def remedy(
    model: nn.Module, taken: Probe, rows: Any, how: Collating, train: TrainRecipe, updates: int, needed: int
) -> str:
    """The smallest change of the recipe with which at most `needed` bytes are held beside the loaded model."""
    longest = int(rows.lengths.max())
    while how.token_budget > longest:
        how = replace(how, token_budget=max(longest, how.token_budget // 2))
        found = forecast(model, taken, rows, how, train, updates)
        if found.missing <= needed:
            return f"train.micro_batch_tokens={how.token_budget} (peak {size_text(found.peak)})"
    if not train.gradient_checkpointing:
        return "train.gradient_checkpointing=true, which keeps less of each layer and computes it again"
    return f"data.max_length={longest // 2}, or a smaller model"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_text(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float | None) -> str:
    """Seconds as people read them."""
    if seconds is None:
        return "not known"
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
