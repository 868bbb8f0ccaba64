"""The proof at the end of a run: each claim with its number, and whether it holds."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from smidgen.adapters.attach import weight_changes
from smidgen.adapters.base import Adapter, in_adapter
from smidgen.adapters.files import adapter_state_dict
from smidgen.data.conversations import conversation_ids
from smidgen.data.preference_rows import LabelledRows, PairRows
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.data.task_rows import TaskRow, TaskRows, answer_text
from smidgen.data.tasks import STEP_LABELS
from smidgen.models.fingerprint import fingerprint
from smidgen.models.generate import generate_batch
from smidgen.models.lineage import Lineage, hashes, weight_files
from smidgen.models.load import stop_token_ids
from smidgen.models.rewards import told_scores
from smidgen.models.tasks import labels_of, predict, recorded, recorded_losses
from smidgen.proofs import RECORD_NAME, Check, lines
from smidgen.recipe_parts import REWARDS
from smidgen.training.loop import ACCURACY, SHOWN, evaluate
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
    """The loss of the measured rows, the objective's metrics, and the answers to the prompts of the sample rows."""

    loss: float
    metrics: dict[str, float]
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


def measured_rows(setup: Setup) -> TokenRows | PairRows | LabelledRows | TaskRows:
    """The held-out rows; the first training rows where none are held out."""
    rows = setup.data.train
    return setup.data.eval or rows.select(np.arange(min(TRAIN_ROWS_MEASURED, len(rows))))


def measure(setup: Setup, accelerator: Accelerator, known: dict[str, float] | None = None) -> Measured:
    """The losses of the measured rows (`known`, if they are) and the answers to the sample prompts, as it is now."""
    rows = measured_rows(setup)
    found = dict(known or evaluate(setup.model, setup.objective, rows, setup.how, accelerator))
    samples = _samples(rows.wanted)
    if setup.recipe.objective in REWARDS:
        return Measured(found.pop("loss"), found, [told_scores(setup.model, row) for row in samples])
    if setup.recipe.task != "causal_lm":
        answered = [(row, predict(setup.model, row, setup.recipe.task, setup.how.pad_id)) for row in samples]
        return Measured(found.pop("loss"), found, [_answer(setup, row, answer) for row, answer in answered])
    split = [_split(row) for row in samples]
    longest = max(len(reference) for _, reference in split)
    answers = generate_batch(
        setup.model,
        setup.tokenizer,
        [prompt for prompt, _ in split],
        max_new_tokens=min(SAMPLE_TOKENS, longest * 5 // 4 + 4),
        stop_ids=stop_token_ids(setup.model, setup.tokenizer),
        images=[row.images for row in samples],
    )
    return Measured(found.pop("loss"), found, [_text(setup, answer) for answer in answers])


def samples_of(setup: Setup, before: Measured, after: Measured) -> list[Sample]:
    """The sample rows with the answers of both measurements."""
    chosen = _samples(measured_rows(setup).wanted)
    if setup.recipe.objective == "process_reward":
        right = (answer_text(row, row.labels, "process_reward", setup.tokenizer, STEP_LABELS) for row in chosen)
        told = [(_text(setup, row.input_ids.tolist()), text) for row, text in zip(chosen, right)]
    elif setup.recipe.task == "causal_lm":
        told = [
            (_text(setup, prompt, special=False), _text(setup, reference)) for prompt, reference in map(_split, chosen)
        ]
    else:
        told = [(_text(setup, row.input_ids.tolist()), _answer(setup, row, row.labels)) for row in chosen]
    return [Sample(*texts, *answers) for texts, *answers in zip(told, before.answers, after.answers, strict=True)]


# ---- the checks ----


def check_loss(setup: Setup, before: Measured, after: Measured) -> Check:
    """The tuned model has a lower loss on the measured rows than at the start."""
    rows, off, on = measured_rows(setup), before.loss, after.loss
    what = "held-out" if setup.data.eval else "training"
    state = "base {:.4f} -> tuned {:.4f}" if setup.trains_base else "adapter off {:.4f} -> on {:.4f}"
    text = f"loss on {len(rows):,} {what} rows: {state.format(off, on)} ({100 * (on / off - 1):+.1f}%)"
    text += "".join(f"; {n} {before.metrics[n]:.3f} -> {after.metrics[n]:.3f}" for n in SHOWN if n in after.metrics)
    if ACCURACY in after.metrics:
        low, high = (100 * after.metrics[f"{ACCURACY}.{end}"] for end in ("low", "high"))
        text += f"; accuracy {100 * after.metrics[ACCURACY]:.1f} % (95 % interval {low:.1f} to {high:.1f})"
    kept = {"off": off, "on": on, "rows": len(rows), "kind": what}
    return Check("loss", on < off, text, kept | {"metrics": {"off": before.metrics, "on": after.metrics}})


def check_base(before: str, after: str) -> Check:
    """Training an adapter left the base model as it was."""
    text = "training left the base as it was" if before == after else "the base model was changed"
    return Check("frozen", before == after, text, {"fingerprint": after})


def snapshot(learners: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Up to 4,096 evenly spread values of each tensor, to see later how far it moved."""
    return {name: _spread(tensor).clone() for name, tensor in learners.items()}


def check_moved(setup: Setup, start: Mapping[str, torch.Tensor], steps: int) -> Check:
    """Every trained tensor has another value than at the start, and the weights they act on moved by this much."""
    adapters = (module for module in setup.model.modules() if isinstance(module, Adapter))
    spent = {parameter for adapter in adapters if adapter.is_idle() for parameter in adapter.parameters()}
    learners = {name: tensor for name, tensor in setup.learners.items() if tensor not in spent}
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


def write_record(setup: Setup, saved: Path, base: str, lineage: Lineage) -> None:
    """Write what a fresh process has to find again beside what was saved.

    Args:
        saved: the folder of the adapter or the model; the record goes into the run folder above it.
        base: the fingerprint of the base before the training.
        lineage: what the run started from.
    """
    rows = measured_rows(setup).wanted
    shortest = np.argsort(rows.lengths, kind="stable")[:RECORDED_ROWS].tolist()
    chosen = [recorded(rows[i]) for i in shortest]
    losses = recorded_losses(setup.model, chosen, setup.recipe.model_task)
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
        "task": setup.recipe.model_task,
        "rows": [row | {"loss": loss} for row, loss in zip(chosen, losses, strict=True)],
        "conversations": conversation_ids(tokenizer),
        "stop_tokens": sorted(stop_token_ids(setup.model, setup.tokenizer)) if setup.model.can_generate() else [],
        "lineage": asdict(replace(lineage, files=hashes(weight_files(saved), saved.parent))),
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


def _samples(rows: Any) -> list[Any]:
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


def _answer(setup: Setup, row: TaskRow, answer: np.ndarray) -> str:
    return answer_text(row, answer, setup.recipe.task, setup.tokenizer, labels_of(setup.model))


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    return flat[:: max(1, flat.numel() // 4096)]


def _norm_ratio(change: torch.Tensor, whole: torch.Tensor) -> float:
    return (change.float().norm() / whole.float().norm().clamp_min(1e-12)).item()
