"""The proof at the end of a run: each claim with its number, and whether it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smidgen.adapters.attach import adapted_modules, fold_in_float32
from smidgen.adapters.base import in_adapter
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.models.generate import generate_batch
from smidgen.models.load import stop_token_ids
from smidgen.training.loop import evaluate
from smidgen.training.reload_check import row_losses
from smidgen.training.setup import Setup

SAMPLES = 4
SAMPLE_TOKENS = 48
RELOAD_ROWS = 4
RELOAD_TOLERANCE = 1e-5
TRAIN_ROWS_MEASURED = 64  # where nothing is held out


@dataclass(frozen=True)
class Check:
    """One claim: what was measured, told in `text`, and whether it holds."""

    name: str
    passed: bool
    text: str
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One row: the prompt, what the row says, and what the model answered before and after the training."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True)
class Measured:
    """The loss of the measured rows, and the answers to the prompts of the sample rows."""

    loss: float
    answers: list[str]


@dataclass(frozen=True)
class Proof:
    """All checks of a run, and its samples."""

    checks: list[Check]
    samples: list[Sample]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def lines(self) -> list[str]:
        """One line for each check."""
        return [f"{'ok  ' if check.passed else 'FAIL'} {check.text}" for check in self.checks]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.write_text(json.dumps({"passed": self.passed, **asdict(self)}, indent=2), encoding="utf-8")


def measured_rows(setup: Setup) -> TokenRows:
    """The held-out rows; the first training rows where none are held out."""
    rows = setup.data.train
    return setup.data.eval or rows.select(np.arange(min(TRAIN_ROWS_MEASURED, len(rows))))


def measure(setup: Setup, accelerator: Accelerator, loss: float | None = None) -> Measured:
    """The loss of the measured rows (`loss`, where it is known) and the answers to the sample prompts, as it is now."""
    rows = measured_rows(setup)
    if loss is None:
        loss = evaluate(setup.model, setup.objective, rows, setup.how, accelerator)
    split = [_split(row) for row in _samples(rows)]
    longest = max(len(reference) for _, reference in split)
    answers = generate_batch(
        setup.model,
        setup.tokenizer,
        [prompt for prompt, _ in split],
        max_new_tokens=min(SAMPLE_TOKENS, longest * 5 // 4 + 4),
        stop_ids=stop_token_ids(setup.model, setup.tokenizer),
    )
    return Measured(loss, [_text(setup, answer) for answer in answers])


def samples_of(setup: Setup, before: Measured, after: Measured) -> list[Sample]:
    """The sample rows with the answers of both measurements."""
    split = [_split(row) for row in _samples(measured_rows(setup))]
    return [
        Sample(_text(setup, prompt, special=False), _text(setup, reference), *answers)
        for (prompt, reference), *answers in zip(split, before.answers, after.answers, strict=True)
    ]


# ---- the checks ----


def check_loss(setup: Setup, before: float, after: float) -> Check:
    """The tuned model has a lower loss on the measured rows than the base."""
    rows = measured_rows(setup)
    what = "held-out" if setup.data.eval else "training"
    state = "base {:.4f} -> tuned {:.4f}" if setup.trains_base else "adapter off {:.4f} -> on {:.4f}"
    text = f"loss on {len(rows):,} {what} rows: {state.format(before, after)} ({100 * (after / before - 1):+.1f}%)"
    return Check("loss", after < before, text, {"off": before, "on": after, "rows": len(rows), "kind": what})


def check_base(before: str, after: str) -> Check:
    """Training an adapter left the base model as it was."""
    text = "base model unchanged" if before == after else "the base model was changed"
    return Check("base", before == after, text, {"fingerprint": after})


def snapshot(learners: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Up to 4,096 evenly spread values of each tensor, to see later how far it moved."""
    return {name: _spread(tensor).clone() for name, tensor in learners.items()}


def check_moved(setup: Setup, start: Mapping[str, torch.Tensor]) -> Check:
    """Every trained tensor has another value than at the start, and the weights they act on moved by this much."""
    learners = setup.learners
    still = [
        name for name, tensor in learners.items() if torch.equal(_spread(tensor).to(start[name].dtype), start[name])
    ]
    if setup.trains_base:
        ratios = [_norm_ratio(_spread(tensor) - start[name], start[name]) for name, tensor in learners.items()]
    else:
        ratios = list(_weight_changes(setup.model))
    median = float(np.median(ratios)) if ratios else None
    moved = len(learners) - len(still)
    what = "model" if setup.trains_base else "adapter"
    text = f"{what} moved: {moved}/{len(learners)} tensors"
    text += f", ||dW||/||W|| median {median:.1e}" if median is not None else ""
    text += f"; still: {', '.join(still[:5])}" if still else ""
    return Check("moved", not still, text, {"moved": moved, "tensors": len(learners), "ratio": median, "still": still})


def check_reload(setup: Setup, saved: Path) -> Check:
    """What was saved, loaded by a fresh process, gives the losses that the trained model gives here."""
    rows = measured_rows(setup)
    shortest = np.argsort(rows.lengths, kind="stable")[:RELOAD_ROWS].tolist()
    chosen = [(rows[i].input_ids.tolist(), rows[i].supervised.tolist()) for i in shortest]
    here = row_losses(setup.model, chosen)
    request = {
        "base": str(saved if setup.trains_base else setup.base),
        "adapter": None if setup.trains_base else str(saved),
        "dtype": str(base_dtype(setup.model)).removeprefix("torch."),
        "device": str(setup.model.device),
        "threads": torch.get_num_threads(),
        "rows": chosen,
    }
    process = subprocess.run(
        [sys.executable, "-m", "smidgen.training.reload_check"],
        input=json.dumps(request),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if process.returncode:
        told = process.stderr.strip().splitlines()[-1:] or ["no message"]
        return Check("reload", False, f"reload in a fresh process failed: {told[0]}", {})
    there = json.loads(process.stdout.splitlines()[-1])
    worst = max(abs(a - b) for a, b in zip(here, there, strict=True))
    same = "equal to the bit" if here == there else f"largest difference {worst:.1e}"
    text = f"reload in a fresh process: loss of {len(here)} rows {same}"
    return Check("reload", worst <= RELOAD_TOLERANCE, text, {"here": here, "fresh": there, "largest_difference": worst})


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the base model's parameters; adapters do not count."""
    return next(p.dtype for name, p in model.named_parameters() if not in_adapter(name) and p.is_floating_point())


# ---- rows and texts ----


def _samples(rows: TokenRows) -> list[TokenRow]:
    """Some rows, evenly spread, that can be continued: they have at least two tokens."""
    fit = (
        [index for index in range(len(rows)) if rows.lengths[index] >= 2]
        if len(rows) < 1000
        else list(range(len(rows)))
    )
    return [rows[fit[i]] for i in np.unique(np.linspace(0, len(fit) - 1, SAMPLES).astype(int))]


def _split(row: TokenRow) -> tuple[list[int], list[int]]:
    """A row's prompt and what follows; a text that is learned from its start is cut in the middle."""
    ids = row.input_ids.tolist()
    cut = row.prompt_length if 1 < row.prompt_length < len(ids) else max(1, len(ids) // 2)
    return ids[:cut], ids[cut:]


def _text(setup: Setup, ids: list[int], special: bool = True) -> str:
    return setup.tokenizer.decode(ids, skip_special_tokens=special)


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 4096)]


@torch.no_grad()
def _weight_changes(model: nn.Module) -> Iterator[float]:
    """||dW|| / ||W|| of every weight that the adapter acts on."""
    for _, module in adapted_modules(model):
        weight = fold_in_float32(module, [])["weight"].float()
        yield _norm_ratio(fold_in_float32(module, list(module.adapters))["weight"].float() - weight, weight)


def _norm_ratio(change: torch.Tensor, whole: torch.Tensor) -> float:
    return (change.float().norm() / whole.float().norm().clamp_min(1e-12)).item()
