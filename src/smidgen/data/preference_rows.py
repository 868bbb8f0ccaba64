"""Preferences as token rows: two rows for each pair, with the same prompt; one row for each labelled answer."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from smidgen.data.formats import Example
from smidgen.data.preference import Labelled, Pair, answer_example
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.data.tokenise import Cuts, Left, Piece, Tokeniser
from smidgen.errors import DataError


class PairRow(NamedTuple):
    """A pair. margin: how much better the chosen answer is."""

    chosen: TokenRow
    rejected: TokenRow
    margin: float

    @property
    def where(self) -> str:
        return self.chosen.where


@dataclass(frozen=True)
class PairRows(Sequence[PairRow]):
    """Pairs over token rows.

    rows: the chosen, then the rejected answer of each pair, each after the prompt.
    margins: of each pair, how much better the chosen answer is; 0 where the data do not say.
    reference: of each row the log-probability of its answer under the reference, float32; None: not known beforehand.
    """

    rows: TokenRows
    margins: np.ndarray
    reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.margins)

    def __getitem__(self, index: int) -> PairRow:  # type: ignore[override]
        return PairRow(self.rows[2 * index], self.rows[2 * index + 1], float(self.margins[index]))

    def __iter__(self) -> Iterator[PairRow]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, the prompt counted twice, int64."""
        return self.rows.lengths.reshape(-1, 2).sum(1)

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Of each pair, how many tokens of both answers carry loss."""
        return self.rows.supervised_counts.reshape(-1, 2).sum(1)

    @property
    def wanted(self) -> TokenRows:
        """The rows of the chosen answers."""
        return self.rows.select(np.arange(0, len(self.rows), 2))

    @property
    def fingerprint(self) -> str:
        """What tells these pairs, in this order, from others."""
        return hashlib.sha256(self.rows.fingerprint.encode() + self.margins.tobytes()).hexdigest()

    def select(self, indices: np.ndarray) -> PairRows:
        """Answer the pairs at these indices, in this order, over the same arrays."""
        both = np.stack([2 * indices, 2 * indices + 1], axis=1).reshape(-1)
        known = None if self.reference is None else self.reference[both]
        return PairRows(self.rows.select(both), self.margins[indices], known)


class LabelledRow(NamedTuple):
    """A row and whether its answer is one to learn or to avoid; the same prompt with an answer to another."""

    row: TokenRow
    desirable: bool
    mismatched: TokenRow

    @property
    def where(self) -> str:
        return self.row.where


@dataclass(frozen=True)
class LabelledRows(Sequence[LabelledRow]):
    """Token rows, and of each whether its answer is one to learn (bool) or to avoid.

    mismatched: each row with the answer of another, from which KTO estimates a KL: see `mismatch`.
    reference, mismatched_reference: of each row the log-probability of its answer under the reference, float32; None:
        not known beforehand.
    """

    rows: TokenRows
    desirable: np.ndarray
    mismatched: TokenRows
    reference: np.ndarray | None = None
    mismatched_reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LabelledRow:  # type: ignore[override]
        return LabelledRow(self.rows[index], bool(self.desirable[index]), self.mismatched[index])

    def __iter__(self) -> Iterator[LabelledRow]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return self.rows.lengths

    @property
    def supervised_counts(self) -> np.ndarray:
        """Of each row, how many tokens carry loss."""
        return self.rows.supervised_counts

    @property
    def wanted(self) -> TokenRows:
        """The rows whose answers are to be learned; all, where none is."""
        return self.rows.select(np.flatnonzero(self.desirable)) if self.desirable.any() else self.rows

    @property
    def fingerprint(self) -> str:
        """What tells these rows, in this order, from others."""
        return hashlib.sha256(self.rows.fingerprint.encode() + self.desirable.tobytes()).hexdigest()

    def select(self, indices: np.ndarray) -> LabelledRows:
        """Answer the rows at these indices, in this order, over the same arrays."""
        known = [x if x is None else x[indices] for x in (self.reference, self.mismatched_reference)]
        return LabelledRows(self.rows.select(indices), self.desirable[indices], self.mismatched.select(indices), *known)


def mismatch(rows: TokenRows) -> TokenRows:
    """Give each row the answer of the next row, the first following the last, that has another prompt.

    No row becomes longer than the longest there was: then the answer loses its end.

    Raises:
        DataError: all rows have the same prompt.
    """
    parts = []
    for row in rows:
        start = int(np.argmax(row.supervised))
        parts.append((row.input_ids[:start], row.input_ids[start:], row.supervised[start:]))
    prompts = [prompt.tobytes() for prompt, _, _ in parts]
    if len(set(prompts)) < 2:
        raise DataError("KTO estimates a KL from answers to other prompts; these rows have a single prompt")
    count, longest = len(parts), int(rows.lengths.max())
    following = [0] * (2 * count)
    for at in range(2 * count - 2, -1, -1):
        other = (at + 1) % count
        following[at] = other if prompts[other] != prompts[at % count] else following[at + 1]
    made = []
    for index, (prompt, _, _) in enumerate(parts):
        _, answer, learned = parts[following[index]]
        room = longest - len(prompt)
        made.append((prompt, answer[:room], learned[:room]))
    lengths = [len(prompt) + len(answer) for prompt, answer, _ in made]
    return replace(
        rows,
        ids=np.concatenate([part for prompt, answer, _ in made for part in (prompt, answer)]),
        learned=np.concatenate([part for p, _, mask in made for part in (np.zeros(len(p), dtype=bool), mask)]),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        **{name: getattr(rows, name)[rows.order] for name in ("file", "line", "state", "digest")},
        order=np.arange(count),
        images={},
    )


def pair_pieces(tokeniser: Tokeniser, pairs: Sequence[Pair]) -> Iterator[list[Piece | Left]]:
    """Tokenise pairs chunk by chunk: for each, the pieces of its chosen and its rejected answer, or why there are none.

    Where one of the two is too long, the prompt is cut alike in both; a pair is counted once, by its longer answer. A
    pair is left out when either answer is, when both are the same tokens, and when they became so by the cut.
    """
    whole = copy.copy(tokeniser)
    whole.max_length = sys.maxsize
    waiting = iter(pairs)
    for pieces in whole.pieces(example for pair in pairs for example in pair_examples(pair)):
        both = zip(pieces[::2], pieces[1::2], strict=True)  # a chunk holds whole pairs
        yield [piece for found in both for piece in _fitted(tokeniser, next(waiting), found)]


def label_pieces(tokeniser: Tokeniser, rows: Sequence[Labelled]) -> Iterator[list[Piece | Left]]:
    """Tokenise labelled rows chunk by chunk: for each, its piece, or why there is none."""
    return tokeniser.pieces(map(labelled_example, rows))


def labelled_example(row: Labelled) -> Example:
    """The prompt with its answer."""
    return answer_example(row.line, row.prompt, row.answer, row.tools)


def pair_examples(pair: Pair) -> tuple[Example, Example]:
    """The prompt with the chosen and with the rejected answer."""
    chosen, rejected = (answer_example(pair.line, pair.prompt, a, pair.tools) for a in (pair.chosen, pair.rejected))
    return chosen, rejected


def _fitted(tokeniser: Tokeniser, pair: Pair, whole: tuple[Piece | Left, Piece | Left]) -> list[Piece | Left]:
    found = [piece for piece in whole if isinstance(piece, Piece)]
    if len(found) < 2:
        return [next(piece for piece in whole if isinstance(piece, Left))]
    if found[0].ids == found[1].ids:
        return [Left(pair.line, "chosen and rejected are the same tokens")]
    lengths = [len(piece.ids) for piece in found]
    excess = max(lengths) - tokeniser.max_length
    if excess <= 0:
        return [*found]
    uncounted = copy.copy(tokeniser)
    uncounted.cuts = Cuts()
    longer = lengths.index(max(lengths))
    fitted = [
        (tokeniser if at == longer else uncounted).fit(example, piece, excess)
        for at, (example, piece) in enumerate(zip(pair_examples(pair), found))
    ]
    ids = [piece.ids for piece in fitted if isinstance(piece, Piece)]
    if len(ids) < 2:
        return [next(piece for piece in fitted if isinstance(piece, Left))]
    if ids[0] == ids[1]:
        return [Left(pair.line, f"chosen and rejected are the same after the cut to max_length={tokeniser.max_length}")]
    return fitted
