"""Preferences as token rows: two rows for each pair, with the same prompt; one row for each labelled answer."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from smidgen.data.formats import Example
from smidgen.data.messages import common_start
from smidgen.data.preference import Labelled, Pair, answer_example
from smidgen.data.rows import TokenRow, TokenRows
from smidgen.data.tokenise import Cuts, Left, Piece, Tokeniser


class PairRow(NamedTuple):
    """A pair. shared: how many tokens at the beginning, none of them learned, are the same in both rows."""

    chosen: TokenRow
    rejected: TokenRow
    shared: int
    margin: float


@dataclass(frozen=True)
class PairRows(Sequence[PairRow]):
    """Pairs over token rows.

    rows: the chosen, then the rejected answer of each pair, each after the prompt.
    margins: of each pair, how much better the chosen answer is; 0 where the data do not say.
    """

    rows: TokenRows
    margins: np.ndarray

    def __len__(self) -> int:
        return len(self.margins)

    def __getitem__(self, index: int) -> PairRow:  # type: ignore[override]
        chosen, rejected = self.rows[2 * index], self.rows[2 * index + 1]
        least = min(int(np.argmax(row.supervised)) for row in (chosen, rejected))
        shared = common_start(chosen.input_ids[:least].tolist(), rejected.input_ids[:least].tolist())
        return PairRow(chosen, rejected, shared, float(self.margins[index]))

    def __iter__(self) -> Iterator[PairRow]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each pair, the prompt counted twice, int64."""
        return self.rows.lengths.reshape(-1, 2).sum(1)

    def select(self, indices: np.ndarray) -> PairRows:
        """Answer the pairs at these indices, in this order, over the same arrays."""
        both = (2 * indices[:, None] + [0, 1]).reshape(-1)
        return PairRows(self.rows.select(both), self.margins[indices])


@dataclass(frozen=True)
class LabelledRows(Sequence[tuple[TokenRow, bool]]):
    """Token rows, and of each whether its answer is one to learn (bool) or to avoid."""

    rows: TokenRows
    desirable: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[TokenRow, bool]:  # type: ignore[override]
        return self.rows[index], bool(self.desirable[index])

    def __iter__(self) -> Iterator[tuple[TokenRow, bool]]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return self.rows.lengths

    def select(self, indices: np.ndarray) -> LabelledRows:
        """Answer the rows at these indices, in this order, over the same arrays."""
        return LabelledRows(self.rows.select(indices), self.desirable[indices])


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
