"""How well a model answers rows with labels: classes, answers in a context, texts to write.

Letters: T tokens, L labels of a row, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from smidgen.data.formats import FileRows, Tally
from smidgen.data.packing import IGNORED
from smidgen.data.task_rows import TaskEncoder, TaskRow, task_batch
from smidgen.data.tasks import TaskExample, has_labels
from smidgen.data.tokenise import Encoded, Left
from smidgen.errors import DataError, UsageError, raise_all
from smidgen.evaluation.metrics import macro_f1, same_words, word_f1
from smidgen.losses.lm import token_cross_entropy
from smidgen.models.peft_model import AdaptedModel
from smidgen.models.tasks import is_scalar, labels_of, predict, task_logits
from smidgen.proofs import wilson

_ROWS = 64  # computed at once
_LONGEST_ANSWER = 30  # tokens

Say = Callable[[str], None]
Windows = list[tuple[TaskExample, list[Encoded]]]  # the rows with their tokens


def score(
    model: Any,
    tokenizer: Any,
    files: Sequence[FileRows],
    task: str,
    *,
    max_length: int | None = None,
    progress: Say | None = None,
) -> list[str]:
    """Answer all rows; answer the lines to tell: how many are right, with what certainty, and what a guess would reach.

    Args:
        model: one that `load_model` or `load_adapted` answers for this task.
        files: as `data.tasks.read_files` answers them.
        max_length: the most tokens of a row; None: what the tokenizer allows.

    Raises:
        DataError: a row has a label that the model does not know; there is no row.
    """
    labels = labels_of(model) if has_labels(task) else []
    rows, lines = _encode(tokenizer, files, task, labels, max_length)
    if task == "seq_2_seq_lm":
        return lines + _told_losses(model, tokenizer, rows, progress)
    logits = _answers(model, tokenizer, rows, task, progress)
    if task == "question_ans":
        return lines + _told_answers(rows, logits)
    return lines + _told_classes(rows, logits, task, labels)


def told(model: Any, tokenizer: Any, texts: Sequence[str], task: str) -> Iterator[str]:
    """For each text its class with the probability, or what the model rewrites it to.

    Raises:
        UsageError: the task needs more than a text.
    """
    if task not in ("seq_cls", "seq_2_seq_lm"):
        raise UsageError(f"a model for {task} is asked with rows of a file: smidgen evaluate RUN --data FILE")
    if is_scalar(model):
        raise UsageError("a reward model scores answers, and gives none: smidgen score RUN FILE")
    encoder, labels = TaskEncoder(task, tokenizer, labels_of(model), tokenizer.model_max_length), labels_of(model)
    for text in texts:
        (encoded,) = _whole(encoder.encode(TaskExample(0, text, None, None)))
        row = _row(encoded)
        if task == "seq_2_seq_lm":
            yield tokenizer.decode(predict(model, row, task, tokenizer.pad_token_id).tolist(), skip_special_tokens=True)
            continue
        with torch.no_grad():
            batch = task_batch([row], [0], tokenizer.pad_token_id).to(model.device)
            chances = task_logits(model, batch, task)[0, 0].float().softmax(-1)
        yield f"{labels[int(chances.argmax())]}\t{chances.max():.3f}"


def _encode(
    tokenizer: Any, files: Sequence[FileRows], task: str, labels: Sequence[str], max_length: int | None
) -> tuple[Windows, list[str]]:
    """The rows with their tokens, and a line about those that are left out or cut."""
    encoder = TaskEncoder(task, tokenizer, labels, max_length or tokenizer.model_max_length)
    rows: Windows = []
    left, problems = 0, []
    for file in files:
        wrong = Tally()
        left += file.unusable.count()
        for example in file.examples:
            encoded = encoder.encode(example)
            if not isinstance(encoded, Left):
                rows.append((example, encoded))
            elif encoded.mistake:
                wrong.add(encoded.reason, str(encoded.line))
            else:
                left += 1
        problems += wrong.problems(file.path)
    raise_all(DataError, problems)
    if not rows:
        raise DataError("evaluation: the data hold no rows")
    lines = [f"{left:,} rows are left out: empty, or without room for a context"] * bool(left)
    lines += [f"{encoder.cuts.end_cut:,} rows lose their last words"] * bool(encoder.cuts.end_cut)
    return rows, lines


def _whole(encoded: list[Encoded] | Left) -> list[Encoded]:
    assert not isinstance(encoded, Left)
    return encoded


def _row(encoded: Encoded) -> TaskRow:
    arrays = [np.array(values, dtype=np.int64) for values in (encoded.ids, encoded.second, encoded.labels)]
    return TaskRow(*arrays, where="")


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, rows: Windows, task: str, progress: Say | None) -> list[torch.Tensor]:
    """The logits of every window in order, (L, C) float32, without padding."""
    flat = [_row(window) for _, windows in rows for window in windows]
    order = sorted(range(len(flat)), key=lambda index: len(flat[index].input_ids))
    found: list[torch.Tensor] = [torch.empty(0)] * len(flat)
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        batch = task_batch([flat[index] for index in part], part, tokenizer.pad_token_id).to(model.device)
        for index, logits in zip(part, task_logits(model, batch, task).float().cpu()):
            length = len(flat[index].input_ids)
            places = slice(len(flat[index].labels)) if task != "question_ans" else slice(None)
            found[index] = logits[places] if task != "question_ans" else logits[:, :length]
        if progress and (start // _ROWS) % 16 == 15:
            progress(f"{start + len(part):,} of {len(order):,}")
    return found


def _told_classes(rows: Windows, logits: list[torch.Tensor], task: str, labels: list[str]) -> list[str]:
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    for (_, (window,)), answer in zip(rows, logits, strict=True):
        wanted = np.array(window.labels)
        there = wanted != IGNORED
        np.add.at(confusion, (wanted[there], answer.argmax(-1).numpy()[there]), 1)
    count, right = int(confusion.sum()), int(np.trace(confusion))
    often = int(confusion.sum(1).argmax())
    what = "rows" if task == "seq_cls" else f"words of {len(rows):,} rows"
    low, high = wilson(right, count)
    guess = confusion.sum(1).max() / count
    return [
        f"always '{labels[often]}', the most frequent label here: {guess:.1%} right",
        f"macro-F1 {macro_f1(confusion):.3f} over {int((confusion.sum(1) > 0).sum())} labels",
        f"accuracy on {count:,} {what}: {right / count:.1%} (95 % interval {low:.1%} to {high:.1%})",
    ]


def _told_answers(rows: Windows, logits: list[torch.Tensor]) -> list[str]:
    right, total, answers = 0, 0.0, iter(logits)
    for example, windows in rows:
        found = best_answer(example.second or "", [(window.spans, next(answers)) for window in windows])
        wanted = [(example.second or "")[first:end] for first, end in example.answer] or [""]
        right += any(same_words(found, text) for text in wanted)
        total += max(word_f1(found, text) for text in wanted)
    low, high = wilson(right, len(rows))
    return [
        f"F1 of the words {total / len(rows):.3f}",
        f"exact match on {len(rows):,} questions: {right / len(rows):.1%} (95 % interval {low:.1%} to {high:.1%})",
    ]


def best_answer(context: str, windows: Sequence[tuple[list[tuple[int, int] | None], torch.Tensor]]) -> str:
    """The likeliest stretch of the context; an empty text where the first token, "no answer", is likelier.

    Args:
        windows: of each, the characters of its tokens and its logits (2, T) of first and last tokens.
    """
    best, none, found = -torch.inf, torch.inf, ""
    for spans, logits in windows:
        none = min(none, float(logits[:, 0].sum()))
        outside = torch.tensor([span is None for span in spans])
        first, last = logits.masked_fill(outside, -torch.inf)
        sums = first[:, None] + last[None]
        allowed = torch.ones_like(sums).triu().tril(_LONGEST_ANSWER - 1).bool()
        sums = sums.masked_fill(~allowed, -torch.inf)
        value, place = sums.flatten().max(0)
        if float(value) > best:
            a, b = divmod(int(place), len(spans))
            start, end = spans[a], spans[b]
            best, found = float(value), context[start[0] : end[1]] if start and end else ""
    return found if best > none else ""


@torch.no_grad()
def _told_losses(model: Any, tokenizer: Any, rows: Windows, progress: Say | None) -> list[str]:
    """Nats for each token of the targets, with the adapter off, where there is one, and on."""
    adapted = isinstance(model, AdaptedModel)
    lines = []
    for name, switch in {"base": model.disable_adapter if adapted else None, "tuned": nullcontext}.items():
        if switch is None:
            continue
        with switch():
            logits = _answers(model, tokenizer, rows, "seq_2_seq_lm", progress)
        targets = [torch.tensor(window.labels) for _, (window,) in rows]
        losses = torch.cat([token_cross_entropy(found, target) for found, target in zip(logits, targets, strict=True)])
        lines.append(
            f"{name}: loss {losses.mean():.4f} for each of {len(losses):,} target tokens of {len(rows):,} rows"
        )
    return lines
