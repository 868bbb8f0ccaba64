"""The reference of a preference objective: the policy as it starts, on the same base, or log-probabilities kept of it.

A second base is never held for it. Where the policy starts as the base, its adapter is switched off while the reference
answers; where it starts otherwise (an adapter that is trained further, a method that does not begin with nothing), the
adapter's tensors of the start are kept and put in place meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from smidgen import kernels
from smidgen.adapters.base import in_adapter
from smidgen.errors import TrainingStopped
from smidgen.models.fingerprint import fingerprint
from smidgen.models.resolve import cache_folder

if TYPE_CHECKING:
    from smidgen.training.objectives import Collating

SAME = 1e-6  # how far the log-ratio of an answer may be from 0 at the start
_PROBE = 16  # tokens that are asked about to see whether the policy starts as the base
_TOKENS = 1024  # computed at once when all rows are computed beforehand; the same everywhere, as rounding depends on it


class Reference:
    """How the reference is had from the model that is trained.

    start: the adapter's tensors when the training began, each with the one that is trained; None: the adapter is
        switched off, or, as long as there is none, the model itself answers.
    """

    def __init__(self, start: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.start = start

    @classmethod
    def of(cls, model: Any, as_base: bool) -> Reference:
        """The reference of a model as it is. Parameters of the base, where they are trained, are not kept.

        Args:
            as_base: whether it may be the base, which is then tried.
        """
        if not hasattr(model, "disable_adapter") or (as_base and cls._is_base(model)):
            return cls()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        own = [tensor for name, tensor in tensors if in_adapter(name)]
        return cls([(tensor, tensor.detach().clone()) for tensor in own])

    @staticmethod
    def _is_base(model: Any) -> bool:
        """Whether its answer is that of the base, to the bit."""
        ids = torch.arange(_PROBE, device=model.device)[None] % model.config.vocab_size
        with torch.no_grad(), evaluating(model):
            policy = model(input_ids=ids).logits
            with model.disable_adapter():
                base = model(input_ids=ids).logits
        return torch.equal(policy, base)

    def told(self, model: Any) -> str:
        """What answers, in words."""
        if not hasattr(model, "disable_adapter"):
            return "the model before the training"
        return "the base, the adapter switched off" if self.start is None else "the adapter as it starts, kept"

    @contextmanager
    def answering(self, model: Any) -> Iterator[None]:
        """Let the model answer as the reference inside the block: without dropout, and without gradient."""
        off = model.disable_adapter() if self.start is None and hasattr(model, "disable_adapter") else nullcontext()
        with torch.no_grad(), evaluating(model), off, self._in_place():
            yield

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        start = self.start or []
        now = [tensor.data for tensor, _ in start]
        for tensor, kept in start:
            tensor.data = kept
        try:
            yield
        finally:
            for (tensor, _), data in zip(start, now):
                tensor.data = data


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def fixed_batches(objective: Any, rows: Any, how: Collating) -> Iterator[Any]:
    """All rows in micro-batches that depend on nothing but the rows and on whether they are packed."""
    how = replace(how, token_budget=max(_TOKENS, int(rows.lengths.max())))
    order = np.argsort(rows.lengths, kind="stable").tolist()
    for begin in range(0, len(order), 64):
        yield from objective.collate(rows, order[begin : begin + 64], how)


def prove_start(model: Any, objective: Any, rows: Any, how: Collating, autocast: torch.dtype | None) -> str:
    """Make sure that the policy starts as the reference says it does; answer a line about it.

    Raises:
        TrainingStopped: a log-ratio is further from 0 than `SAME`.
    """
    device = model.device
    batch = next(fixed_batches(objective, rows, how)).to(device)
    with torch.no_grad(), evaluating(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        ratio = objective.log_probs(model, batch) - objective.of_reference(model, batch)
    most = ratio.abs().max().item()
    told = f"log-ratio at the start within {most:.1e} of 0 over {len(ratio)} answers"
    if not most <= SAME:
        raise TrainingStopped(
            f"reference: {told}, and it must be within {SAME:g}: the reference is not the policy that is trained"
        )
    return told


def precompute(
    model: Any, objective: Any, rows: Any, how: Collating, autocast: torch.dtype | None, say: Callable[[str], None]
) -> Any:
    """The rows with the log-probabilities of their answers under the reference, from the cache where they are in it.

    Args:
        model: that is trained, as it starts, or another one.
    """
    kinds = ["reference", "mismatched_reference"] if hasattr(rows, "mismatched") else ["reference"]
    depends = [fingerprint(model), _hash(objective.reference), rows.fingerprint, getattr(objective, "ld_alpha", 1)]
    depends += [str(model.dtype), str(autocast), how.packing, how.sharing]
    depends += [kernels.chosen(), torch.__version__, str(model.device)]
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]
    path = cache_folder() / "reference" / f"{key}.safetensors"
    if path.exists():
        found = load_file(path)
        say(f"reference: log-probabilities of {len(rows):,} rows from the cache")
        return replace(rows, **{kind: found[kind] for kind in kinds})
    values = {kind: np.zeros(len(rows.rows), dtype=np.float32) for kind in kinds}
    each = len(rows.rows) // len(rows)  # answers of a row
    for batch in fixed_batches(objective, rows, how):
        batch = batch.to(model.device)
        places = [each * row + side for row in batch.rows for side in range(each)]
        with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
            for kind in kinds:
                part = batch if kind == "reference" else batch.mismatched
                values[kind][places] = objective.of_reference(model, part).float().cpu().numpy()
    _write(path, values)
    say(f"reference: log-probabilities of {len(rows):,} rows computed and kept")
    return replace(rows, **values)


def _hash(reference: Reference) -> str:
    found = hashlib.sha256()
    for _, kept in reference.start or []:
        found.update(kept.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _write(path: Path, values: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(values, partial)
    os.replace(partial, path)
