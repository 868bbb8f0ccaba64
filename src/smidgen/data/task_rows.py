"""Rows with labels as token rows and batches. Letters: B rows, T tokens, L labels of a row, S tokens of the target."""

from __future__ import annotations

import copy
import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from smidgen.data.check import DataReport, SetReport, Size, histogram
from smidgen.data.formats import FileRows
from smidgen.data.packing import IGNORED, Batch, filled_behind
from smidgen.data.prepare import Prepared, make_rows, no_garbage_collection
from smidgen.data.rows import COMPLETE, ENDING_LOST, TokenRows
from smidgen.data.solutions import SolutionEncoder
from smidgen.data.tasks import TaskExample, TaskFiles, has_labels
from smidgen.data.tokenise import CHUNK, Cuts, Encoded, Left, Piece
from smidgen.errors import DataError
from smidgen.foreign import shown
from smidgen.recipe import DataRecipe

if TYPE_CHECKING:
    import torch

_STRIDE = 0.25  # of `max_length`: so much of a window of a long context repeats the one before
_AROUND = 4  # special tokens around two texts, at most
_SHOWN = 3


class TaskRow(NamedTuple):
    """One row: T token ids, which of them belong to the second text (bool), its labels, and where it comes from.

    labels: one class (seq_cls); T classes, -100 but at the first token of each word (token_cls) or the last of each
    step (process_reward); the first and the last token of the answer, 0 and 0 where there is none (question_ans); the
    ids of the target (seq_2_seq_lm).
    """

    input_ids: np.ndarray
    second: np.ndarray
    labels: np.ndarray
    where: str


@dataclass(frozen=True)
class TaskRows(Sequence[TaskRow]):
    """Rows with labels.

    rows: the inputs; what counts as learned there is the second text.
    labels: int64, of all rows one behind the other; offsets: where those of each stored row begin, and the end.
    decoded: whether the labels are tokens that a decoder computes beside the inputs.
    """

    rows: TokenRows
    labels: np.ndarray
    offsets: np.ndarray
    decoded: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TaskRow:  # type: ignore[override]
        row, stored = self.rows[index], self.order[index]
        labels = self.labels[self.offsets[stored] : self.offsets[stored + 1]]
        return TaskRow(row.input_ids, row.supervised, labels, row.where)

    def __iter__(self) -> Iterator[TaskRow]:
        return (self[index] for index in range(len(self)))

    @property
    def wanted(self) -> TaskRows:
        """Itself: all are to be answered."""
        return self

    @property
    def fingerprint(self) -> str:
        """What tells these rows, in this order, from others."""
        return hashlib.sha256(self.digest[self.order].tobytes()).hexdigest()

    @property
    def order(self) -> np.ndarray:
        return self.rows.order

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that are computed for each row, int64."""
        return self.rows.lengths + (np.diff(self.offsets)[self.order] if self.decoded else 0)

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Of each row, how many labels carry loss."""
        sums = np.concatenate(([0], np.cumsum(self.labels != IGNORED)))
        return np.diff(sums[self.offsets])[self.order]

    @cached_property
    def digest(self) -> np.ndarray:
        """Of each stored row, a hash of the tokens and the labels, uint64."""
        parts = (self.labels[start:end].tobytes() for start, end in zip(self.offsets, self.offsets[1:]))
        hashes = (int.from_bytes(hashlib.blake2b(part, digest_size=8).digest(), "little") for part in parts)
        return self.rows.digest ^ np.fromiter(hashes, np.uint64, len(self.offsets) - 1)

    def select(self, indices: np.ndarray) -> TaskRows:
        """Answer the rows at these indices, in this order, over the same arrays."""
        return replace(self, rows=self.rows.select(indices))


@dataclass(frozen=True)
class TaskBatch(Batch):
    """A batch of rows with labels, padded behind: labels are (B, 1), (B, T), (B, 2) or (B, S), -100 where none is.

    second: (B, T) int64, 1 at the tokens of the second text; None where no row has one.
    """

    second: torch.Tensor | None = None


def task_batch(rows: Sequence[TaskRow], indices: Sequence[int], pad_id: int) -> TaskBatch:
    """Make a batch of some rows; `indices` are theirs in the data."""
    import torch

    ids = filled_behind([row.input_ids for row in rows], pad_id)
    mask = filled_behind([np.ones_like(row.input_ids) for row in rows], 0)
    second = filled_behind([row.second for row in rows], 0)
    labels = filled_behind([row.labels for row in rows], IGNORED)
    return TaskBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        attention_mask=None if mask.all() else torch.from_numpy(mask),
        position_ids=None,
        rows=list(indices),
        supervised=int((labels != IGNORED).sum()),
        second=torch.from_numpy(second) if second.any() else None,
    )


class TaskEncoder:
    """Tokenises rows with labels, with the special tokens that the tokenizer puts around texts.

    Args:
        tokenizer: a fast tokenizer of transformers.
        labels: the names of the classes in their order.
        on_long: "drop" or "error"; else what is too long loses its ending. Long contexts are cut into windows.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(self, task: str, tokenizer: Any, labels: Sequence[str], max_length: int, on_long: str = "truncate"):
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer (one with a tokenizer.json)")
        self.task, self.on_long = task, on_long
        self.max_length = min(max_length, tokenizer.model_max_length)
        self.classes = {name: index for index, name in enumerate(labels)}
        self.cuts = Cuts()
        self._has_second = "token_type_ids" in tokenizer.model_input_names
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_padding()
        asked = task == "question_ans"
        self._stride = int(_STRIDE * self.max_length) if asked else 0
        strategy = "only_second" if asked else "longest_first"
        self._cutting = {"max_length": self.max_length, "stride": self._stride, "strategy": strategy}

    def encode(self, example: TaskExample) -> list[Encoded] | Left:
        """Tokenise a row; a question with a long context becomes several windows. Or tell why there is none."""
        unknown = [name for name in self._names(example) if name not in self.classes]
        if unknown:
            known = f"{len(self.classes):,} labels are known: {', '.join([*self.classes][:5])}"
            return Left(example.line, f"unknown label '{shown(unknown[0])}'; {known}...", mistake=True)
        text = " ".join(example.text) if self.task == "token_cls" else example.text
        if self._stride and len(self._whole(text)) + _AROUND + self._stride >= self.max_length:
            return Left(example.line, f"the question leaves no room for a context in max_length={self.max_length}")
        self._backend.enable_truncation(**self._cutting)
        found = self._backend.encode(text, example.second) if example.second else self._backend.encode(text)
        windows, target = [found], self._target(example)
        cut = bool(found.overflowing) or len(target) > self.max_length
        if cut:
            self.cuts.long += 1
            if self.on_long == "error":
                return Left(example.line, f"longer than max_length={self.max_length}", mistake=True)
            if self.on_long == "drop":
                self.cuts.dropped += 1
                return Left(example.line, f"longer than max_length={self.max_length}")
            if self.task == "question_ans":
                windows += found.overflowing
                self.cuts.split, self.cuts.pieces = self.cuts.split + 1, self.cuts.pieces + len(windows)
            else:
                self.cuts.end_cut += 1
        return [self._encoded(example, window, target[: self.max_length]) for window in windows]

    def _names(self, example: TaskExample) -> list[str]:
        if not has_labels(self.task) or example.answer is None:
            return []
        return example.answer if self.task == "token_cls" else [example.answer]

    def _whole(self, text: str) -> list[int]:
        self._backend.no_truncation()
        return self._backend.encode(text).ids

    def _target(self, example: TaskExample) -> list[int]:
        return self._whole(example.answer) if self.task == "seq_2_seq_lm" and example.answer is not None else []

    def _encoded(self, example: TaskExample, found: Any, target: list[int]) -> Encoded:
        sides = found.sequence_ids
        second = [bool(kind) and self._has_second for kind in found.type_ids]
        spans = [place if side == 1 else None for place, side in zip(found.offsets, sides)]
        return Encoded(found.ids, second, self._labels(example, found, spans, target), spans)

    def _labels(self, example: TaskExample, found: Any, spans: list[Any], target: list[int]) -> list[int]:
        if example.answer is None or self.task == "seq_2_seq_lm":
            return target
        if self.task == "seq_cls":
            return [self.classes[example.answer]]
        if self.task == "token_cls":
            classes = [self.classes[name] for name in example.answer]
            return [IGNORED if word is None else classes[word] for word in first_tokens(example.text, found)]
        return _answer_tokens(spans, example.answer)


def first_tokens(words: Sequence[str], found: Any) -> list[int | None]:
    """Of each token of words joined by spaces: the index of the word that it is the first token of, or None."""
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
    seen: set[int] = set()
    firsts: list[int | None] = []
    for (first, end), side in zip(found.offsets, found.sequence_ids):
        word = bisect_right(starts, end - 1) - 1
        fresh = side is not None and end > first and word not in seen and end > starts[word]
        seen.update([word] * fresh)
        firsts.append(word if fresh else None)
    return firsts


def _answer_tokens(spans: list[tuple[int, int] | None], answers: list[tuple[int, int]]) -> list[int]:
    """The first and the last token of the first answer; the first token of the row where it is not in the window."""
    if answers:
        first, end = answers[0]
        inside = [at for at, span in enumerate(spans) if span and span[1] > first and span[0] < end]
        context = [span for span in spans if span]
        if inside and context[0][0] <= first and end <= context[-1][1]:
            return [inside[0], inside[-1]]
    return [0, 0]


def prepare_task(
    files: TaskFiles, data: DataRecipe, task: str, tokenizer: Any, labels: Sequence[str], progress: Any = None
) -> Prepared:
    """Tokenise the rows of a run, check them, and account for them.

    Args:
        labels: the names of the classes in the model's order.

    Raises:
        DataError: a label is unknown, or no row is left.
    """
    (train, report), held = _make(files.train, data, task, tokenizer, labels, progress), None
    if not len(train):
        raise DataError("data.train: no row is left to learn from")
    if files.eval:
        held = _make(files.eval, data, task, tokenizer, labels, progress)
    overlap = np.isin(held[0].digest[held[0].order], train.digest[train.order]).sum() if held else 0
    account = DataReport(
        template="none; the rows have labels" + (f", {len(labels)} different ones" if labels else ""),
        max_length=data.max_length,
        train=report,
        eval=held[1] if held else None,
        train_size=Size.of(train, "labels"),
        eval_size=Size.of(held[0], "labels") if held else None,
        duplicates=len(train) - len(np.unique(train.digest[train.order])),
        overlap=int(overlap),
        histogram=histogram(train.lengths),
        samples=_samples(train, task, tokenizer, labels),
    )
    return Prepared(train, held[0] if held else None, account, None)


def _make(
    files: Sequence[FileRows], data: DataRecipe, task: str, tokenizer: Any, labels: Sequence[str], progress: Any
) -> tuple[TaskRows, SetReport]:
    encoder: Any = TaskEncoder(task, tokenizer, labels, data.max_length, data.on_long)
    if task == "process_reward":
        encoder = SolutionEncoder(tokenizer, data.max_length, data.on_long, data.system)
    found: list[list[int]] = []

    def pieces(file: FileRows) -> Iterator[list[Piece | Left]]:
        for start in range(0, len(file.examples), CHUNK):
            made: list[Piece | Left] = []
            for example in file.examples[start : start + CHUNK]:
                before, encoded = encoder.cuts.end_cut, encoder.encode(example)
                if isinstance(encoded, Left):
                    made.append(encoded)
                    continue
                state = ENDING_LOST if encoder.cuts.end_cut > before else COMPLETE
                for part in encoded:
                    marked = [(at, at + 1) for at, second in enumerate(part.second) if second]
                    made.append(Piece(part.ids, marked, example.line, state))
                    found.append(part.labels)
            yield made

    with no_garbage_collection():
        tokens, reports = make_rows(files, pieces, progress)
    offsets = np.cumsum([0, *map(len, found)])
    flat = np.fromiter((label for row in found for label in row), np.int64, offsets[-1])
    return TaskRows(tokens, flat, offsets, task == "seq_2_seq_lm"), SetReport(reports, encoder.cuts, (0, 0))


def _samples(rows: TaskRows, task: str, tokenizer: Any, labels: Sequence[str]) -> list[str]:
    chosen = np.unique(np.linspace(0, len(rows) - 1, _SHOWN).astype(int))
    return [f"--- {rows[index].where}\n{_marked(rows[index], task, tokenizer, labels)}" for index in chosen]


def _marked(row: TaskRow, task: str, tokenizer: Any, labels: Sequence[str]) -> str:
    answer = answer_text(row, row.labels, task, tokenizer, labels)
    return f"{tokenizer.decode(row.input_ids.tolist())} \u27e6{answer}\u27e7"


def answer_text(row: TaskRow, answer: np.ndarray, task: str, tokenizer: Any, labels: Sequence[str]) -> str:
    """What labels, those of a row or predicted ones in the same places, say."""
    if has_labels(task):
        return " ".join(
            str(labels[at]) for at, wanted in zip(answer.tolist(), row.labels.tolist()) if wanted != IGNORED
        )
    if task == "question_ans":
        first, last = answer.tolist()
        return tokenizer.decode(row.input_ids[first : last + 1].tolist()) if last else "(no answer)"
    return tokenizer.decode(answer.tolist(), skip_special_tokens=True)
