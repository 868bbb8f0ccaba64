"""What a run will need, before it begins: memory and time.

A forward and backward pass over a few rows follows every tensor that lives during it, and is timed; a short one is run
again to take its time. Both are scaled by the tokens of the largest micro-batch and of all epochs.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from smidgen.data.rows import TokenRows
from smidgen.models.load import free_memory
from smidgen.models.scores import vocabulary_size
from smidgen.training.objectives import Collating, Objective

PROBE_TOKENS = 512
REPEATED_BELOW = 1.0  # seconds: in a longer pass the first time weighs little
# Wider micro-batches gain little speed: see docs/training.md for the measurements.
PREFERRED_TOKENS = {"cpu": 1024, "mps": 4096, "cuda": 8192}


@dataclass(frozen=True)
class Probe:
    """What one pass over `tokens` tokens took: bytes of activations and logits at its peak, and seconds."""

    tokens: int
    activations: int
    logits: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """Bytes that the run will hold at its peak, by what they are for.

    free: what the device still has. seconds: of all updates. remedy: a change of the recipe that needs less.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    free: int
    micro_batch_tokens: int
    seconds: float
    remedy: str = ""

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.missing

    @property
    def missing(self) -> int:
        """What is not held yet: everything but the loaded model."""
        return self.gradients + self.optimizer + self.activations + self.logits

    @property
    def fits(self) -> bool:
        return self.missing <= self.free

    def lines(self) -> list[str]:
        """The forecast for people; where it does not fit, with the smallest change that does."""
        names = ("weights", "trained", "gradients", "optimizer", "activations", "logits")
        parts = "  ".join(f"{name} {size_text(getattr(self, name))}" for name in names)
        fits = (
            f"fits: {'yes' if self.fits else 'no'} (needs {size_text(self.missing)} more, {size_text(self.free)} free)"
        )
        return [
            f"memory: {parts}",
            f"peak: {size_text(self.peak)} at {self.micro_batch_tokens:,} tokens at once; "
            + (fits if self.fits else f"{fits}. Smallest change: {self.remedy}"),
            f"time: about {_duration(self.seconds)}",
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
    model: nn.Module, objective: Objective, rows: TokenRows, how: Collating, autocast: torch.dtype | None
) -> Probe:
    """Run forward and backward over some 512 tokens of the longest rows; gradients and generators stay untouched."""
    device = next(model.parameters()).device
    longest = np.argsort(rows.lengths)[::-1]
    few = longest[: max(1, PROBE_TOKENS // max(1, int(rows.lengths.max())))].tolist()
    batch = objective.collate(rows, few, replace(how, token_budget=PROBE_TOKENS))[0].to(device)
    learners = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learners:
        parameter.grad = torch.zeros_like(parameter)  # so that gradients do not count as activations

    def run() -> float:
        begun = time.perf_counter()
        with torch.no_grad():
            objective.prepare(model, batch)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            loss = objective.loss(model, batch)[0].sum()
        loss.backward()
        loss.item()
        return time.perf_counter() - begun

    was_training = model.training
    model.train()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with LiveBytes(vocabulary_size(model)) as live:
            seconds = run()
        if seconds < REPEATED_BELOW:
            seconds = run()
    model.train(was_training)
    for parameter in learners:
        parameter.grad = None
    return Probe(batch.input_ids.numel(), *live.peak, seconds)


def forecast(
    model: nn.Module, taken: Probe, rows: TokenRows, how: Collating, batch_size: int, updates: int
) -> Forecast:
    """Scale a probe to a whole run of `updates` updates of `batch_size` rows."""
    longest = int(rows.lengths.max())
    at_once = max(longest, min(how.token_budget, batch_size * longest))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    all_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    tokens = float(rows.lengths.mean()) * batch_size * updates
    return Forecast(
        weights=all_bytes - trained_bytes,
        trained=trained_bytes,
        gradients=trained_bytes,
        optimizer=2 * trained_bytes,
        activations=taken.activations * at_once // taken.tokens,
        logits=taken.logits * at_once // taken.tokens,
        free=free_memory(next(model.parameters()).device),
        micro_batch_tokens=at_once,
        seconds=taken.seconds / taken.tokens * tokens,
    )


def choose_budget(
    model: nn.Module, taken: Probe, rows: TokenRows, how: Collating, batch_size: int, updates: int
) -> Collating:
    """Halve the token budget until the forecast fits, but not below the longest row."""
    while how.token_budget > rows.lengths.max() and not forecast(model, taken, rows, how, batch_size, updates).fits:
        how = replace(how, token_budget=how.token_budget // 2)
    return how


def remedy(
    model: nn.Module,
    taken: Probe,
    rows: TokenRows,
    how: Collating,
    batch_size: int,
    updates: int,
    needed: int,
    checkpointing: bool,
) -> str:
    """The smallest change of the recipe with which at most `needed` bytes are held beside the loaded model."""
    longest = int(rows.lengths.max())
    while how.token_budget > longest:
        how = replace(how, token_budget=max(longest, how.token_budget // 2))
        found = forecast(model, taken, rows, how, batch_size, updates)
        if found.missing <= needed:
            return f"train.micro_batch_tokens={how.token_budget} (peak {size_text(found.peak)})"
    if not checkpointing:
        return "train.gradient_checkpointing=true, which keeps less of each layer and computes it again"
    return f"data.max_length={longest // 2}, or a smaller model"


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_text(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
