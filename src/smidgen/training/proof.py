"""The proof at the end of a run: each claim with its number, and whether it holds."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smidgen.adapters.attach import weight_changes
from smidgen.adapters.base import in_adapter
from smidgen.adapters.files import adapter_state_dict
from smidgen.data.conversations import conversation_ids
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.models.fingerprint import fingerprint
from smidgen.models.generate import generate_batch
from smidgen.models.load import stop_token_ids
from smidgen.models.scores import row_losses
from smidgen.proofs import RECORD_NAME, Check, lines
from smidgen.training.loop import evaluate
from smidgen.training.setup import Setup

SAMPLES = 4
SAMPLE_TOKENS = 48
RECORDED_ROWS = 4
# A median ||dW|| / ||W|| below this changes few answers.
LITTLE = 5e-4
# What a launcher of several processes sets; the process that verifies stands alone.
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TRAIN_ROWS_MEASURED = 64  # where nothing is held out


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
        return lines(self.checks)

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
    text = "training left the base as it was" if before == after else "the base model was changed"
    return Check("frozen", before == after, text, {"fingerprint": after})


def snapshot(learners: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Up to 4,096 evenly spread values of each tensor, to see later how far it moved."""
    return {name: _spread(tensor).clone() for name, tensor in learners.items()}


def check_moved(setup: Setup, start: Mapping[str, torch.Tensor], steps: int) -> Check:
    """Every trained tensor has another value than at the start, and the weights they act on moved by this much."""
    learners = setup.learners
    still = [
        name for name, tensor in learners.items() if torch.equal(_spread(tensor).to(start[name].dtype), start[name])
    ]
    if setup.trains_base:
        ratios = [_norm_ratio(_spread(tensor) - start[name], start[name]) for name, tensor in learners.items()]
    else:
        ratios = [ratio for _, ratio in weight_changes(setup.model)]
    median = float(np.median(ratios)) if ratios else None
    moved = len(learners) - len(still)
    what = "model" if setup.trains_base else "adapter"
    text = f"{what} moved: {moved}/{len(learners)} tensors"
    text += f", ||dW||/||W|| median {median:.1e}" if median is not None else ""
    if median is not None and median < LITTLE:
        text += f" ({100 * median:.2g}% of base norm after {steps:,} steps: likely too few, or too low a learning rate)"
    text += f"; still: {', '.join(still[:5])}" if still else ""
    return Check("moved", not still, text, {"moved": moved, "tensors": len(learners), "ratio": median, "still": still})


def write_record(setup: Setup, saved: Path, base: str) -> None:
    """Write what a fresh process has to find again beside what was saved.

    Args:
        saved: the folder of the adapter or the model; the record goes into the run folder above it.
        base: the fingerprint of the base before the training.
    """
    rows = measured_rows(setup)
    shortest = np.argsort(rows.lengths, kind="stable")[:RECORDED_ROWS].tolist()
    chosen = [(rows[i].input_ids.tolist(), rows[i].supervised.tolist()) for i in shortest]
    losses = row_losses(setup.model, chosen)
    tokenizer = copy.deepcopy(setup.tokenizer)
    tokenizer.chat_template = setup.data.template or setup.tokenizer.chat_template
    tensors = setup.learners if setup.trains_base else adapter_state_dict(setup.model, setup.model.active_adapter)
    record = {
        "base": setup.recipe.model,
        "base_fingerprint": base,
        "fingerprint": fingerprint(setup.model),
        "dtype": str(base_dtype(setup.model)).removeprefix("torch."),
        "device": str(setup.model.device),
        "threads": torch.get_num_threads(),
        "tensors": len(tensors),
        "trained": list(setup.learners),
        "rows": [
            {"ids": ids, "supervised": learned, "loss": loss}
            for (ids, learned), loss in zip(chosen, losses, strict=True)
        ],
        "conversations": conversation_ids(tokenizer),
        "stop_tokens": sorted(stop_token_ids(setup.model, setup.tokenizer)),
    }
    (saved.parent / RECORD_NAME).write_text(json.dumps(record), encoding="utf-8")


def verify_afresh(folder: Path) -> list[Check]:
    """The checks of ``smidgen verify``, made by a process of its own from the files of the run folder."""
    process = subprocess.run(
        [sys.executable, "-m", "smidgen", "verify", str(folder), "--json"],
        capture_output=True,
        encoding="utf-8",
        env={name: value for name, value in os.environ.items() if name not in LAUNCHED},
        check=False,
    )
    try:
        return [Check(**check) for check in json.loads(process.stdout)]
    except ValueError:
        told = process.stderr.strip().splitlines()[-1:] or ["no message"]
        return [Check("verify", False, f"verifying in a fresh process failed: {told[0]}", {})]


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


def _norm_ratio(change: torch.Tensor, whole: torch.Tensor) -> float:
    return (change.float().norm() / whole.float().norm().clamp_min(1e-12)).item()
