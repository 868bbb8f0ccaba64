"""An audit of preference data: what a model could learn from it that is no preference, and what is wrong with it.

Nothing is judged here: the numbers are told, with the lines to look at.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from smidgen.data.formats import FileRows, Message
from smidgen.data.preference import Labelled, Pair, chat_key

_WORD = re.compile(r"\w+")
_SHOWN = 5  # places in a line


@dataclass(frozen=True)
class Lengths:
    """How often the better answer is the longer one, in characters.

    longer, shorter: shares of pairs. Of labelled rows: of all pairs that a good and a bad answer of any prompts make.
    rows: pairs, or labelled rows.
    """

    longer: float
    shorter: float
    rows: int

    def accuracy(self, prefers_longer: bool) -> float:
        """How often a classifier that sees the lengths alone is right; it draws lots between equal ones."""
        right, wrong = (self.longer, self.shorter) if prefers_longer else (self.shorter, self.longer)
        return right + (1 - right - wrong) / 2


@dataclass(frozen=True)
class Near:
    """An evaluation row with the training row whose prompt is nearest, and how near: their Jaccard similarity."""

    place: str
    other: str
    similarity: float


@dataclass(frozen=True)
class Audit:
    """What was found; places are file:line.

    lengths, eval_lengths: None where there are no rows, or none of one label.
    chosen_first: of the pairs whose order of showing is known, how many have the better answer first, and all of them.
    duplicates: rows that repeat an earlier one, with its place.
    contradictions: rows that say the opposite of an earlier one: the same prompt with the answers swapped, or the same
        prompt and answer under the other label.
    near: evaluation rows with the prompt, or nearly the prompt, of a training row; see `near_duplicates`.
    """

    lengths: Lengths | None
    eval_lengths: Lengths | None
    chosen_first: tuple[int, int]
    duplicates: list[tuple[str, str]]
    contradictions: list[tuple[str, str]]
    near: list[Near] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Answer the audit as lines to print."""
        lines = []
        if self.lengths:
            longer = self.lengths.longer >= self.lengths.shorter
            rule = "longer" if longer else "shorter"
            lines.append(
                f"length: the better answer is the longer one in {self.lengths.longer:.1%}, the shorter one in "
                f"{self.lengths.shorter:.1%} of {self.lengths.rows:,} rows; to take the {rule} one is right in "
                f"{self.lengths.accuracy(longer):.1%}"
                + (f", in evaluation in {self.eval_lengths.accuracy(longer):.1%}" if self.eval_lengths else "")
            )
        first, known = self.chosen_first
        if known:
            lines.append(f"position: the better answer was shown first in {first / known:.1%} of {known:,} pairs")
        for name, found, words in (
            ("duplicates", self.duplicates, "repeat an earlier one"),
            ("contradictions", self.contradictions, "say the opposite of an earlier one"),
        ):
            lines.append(f"{name}: {len(found):,} rows {words}{_places(f'{a} of {b}' for a, b in found)}")
        if self.eval_lengths:
            told = (f"{near.place} of {near.other} ({near.similarity:.2f})" for near in self.near)
            lines.append(
                f"overlap: {len(self.near):,} evaluation rows have nearly a training row's prompt{_places(told)}"
            )
        return lines


def audit_preferences(train: Sequence[FileRows], evaluation: Sequence[FileRows] = ()) -> Audit:
    """Audit preference data, as `read_preferences` answers them.

    The rule that a classifier by length follows, longer or shorter, is the one that is right more often in `train`.
    """
    seen: dict[tuple[str, ...], str] = {}
    duplicates, contradictions = [], []
    first = known = 0
    for place, row in _rows(train):
        key, opposite = _keys(row)
        if key in seen:
            duplicates.append((place, seen[key]))
        elif opposite in seen:
            contradictions.append((place, seen[opposite]))
        seen.setdefault(key, place)
        if isinstance(row, Pair) and row.chosen_first is not None:
            known += 1
            first += row.chosen_first
    prompts = ([(place, prompt_text(row)) for place, row in _rows(files)] for files in (evaluation, train))
    return Audit(
        lengths_of([row for _, row in _rows(train)]),
        lengths_of([row for _, row in _rows(evaluation)]),
        (first, known),
        duplicates,
        contradictions,
        near_duplicates(*prompts) if evaluation else [],
    )


def near_duplicates(
    rows: Sequence[tuple[str, str]], others: Iterable[tuple[str, str]], *, width: int = 2, threshold: float = 0.5
) -> list[Near]:
    """Find for each of `rows` the nearest of `others`, where one is near.

    A text is the set of its shingles: all runs of `width` consecutive words, or the whole where it has fewer words.
    Words are the longest runs of letters, digits and underscores, case folded. Two texts are near when their Jaccard
    similarity, shingles in common over shingles of either, is at least `threshold`. The answer is exact: every pair
    that is near has one of the rarest (1 - threshold) of the shingles of a row in common, and all of these are looked
    up. A text without a word is near to nothing.

    Args:
        rows, others: a place and a text each.
    """
    nearest: dict[int, Near] = {}
    for number, near in _near_pairs(rows, others, width, threshold):
        if number not in nearest or near.similarity > nearest[number].similarity:
            nearest[number] = near
    return [nearest[number] for number in sorted(nearest)]


def near_groups(texts: Sequence[str], *, width: int = 2, threshold: float = 0.5) -> list[list[int]]:
    """Put texts into groups, so that texts that are near, as in `near_duplicates`, share one; answer their indices."""
    rows = [(str(number), text) for number, text in enumerate(texts)]
    group = list(range(len(texts)))  # of each text the first of its group, or one on the way there

    def first(number: int) -> int:
        while group[number] != number:
            number = group[number]
        return number

    for number, near in _near_pairs(rows, rows, width, threshold):
        one, other = first(number), first(int(near.other))
        group[max(one, other)] = min(one, other)
    found: dict[int, list[int]] = defaultdict(list)
    for number in range(len(texts)):
        found[first(number)].append(number)
    return list(found.values())


def _near_pairs(
    rows: Sequence[tuple[str, str]], others: Iterable[tuple[str, str]], width: int, threshold: float
) -> Iterator[tuple[int, Near]]:
    """All pairs that are near, each with the index of the row."""
    sets = [_shingles(text, width) for _, text in rows]
    frequency = Counter(chain.from_iterable(sets))
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, shingles in enumerate(sets):
        needed = math.ceil(threshold * len(shingles) - 1e-9)  # so many are in common with whatever is near
        rarest = sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))
        for shingle in rarest[: len(shingles) - needed + 1]:
            holders[shingle].append(number)
    for place, text in others:
        shingles = _shingles(text, width)
        for number in {number for shingle in shingles & holders.keys() for number in holders[shingle]}:
            shared = len(shingles & sets[number])
            similarity = shared / (len(shingles) + len(sets[number]) - shared)
            if similarity >= threshold:
                yield number, Near(rows[number][0], place, similarity)


def _shingles(text: str, width: int) -> set[tuple[str, ...]]:
    words = _WORD.findall(text.casefold())
    return {tuple(words[at : at + width]) for at in range(max(1, len(words) - width + 1))} if words else set()


def _rows(files: Sequence[FileRows]) -> Iterator[tuple[str, Pair | Labelled]]:
    return ((f"{file.path}:{row.line}", row) for file in files for row in file.examples)


def _keys(row: Pair | Labelled) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a row says, and what the row that says the opposite would."""
    prompt = chat_key(row.prompt, row.tools)
    if isinstance(row, Pair):
        chosen, rejected = chat_key(row.chosen), chat_key(row.rejected)
        return (prompt, chosen, rejected), (prompt, rejected, chosen)
    answer = chat_key(row.answer)
    return (prompt, answer, str(row.desirable)), (prompt, answer, str(not row.desirable))


def prompt_text(row: Pair | Labelled) -> str:
    """What is asked: the prompt's messages but the system's, a line each."""
    return "\n".join(message["content"] for message in row.prompt if message["role"] != "system")


def _length(answer: list[Message]) -> int:
    return sum(len(message["content"].strip()) for message in answer)


def lengths_of(rows: Sequence[Pair | Labelled]) -> Lengths | None:
    """How often the better answer is the longer one; None where there are no rows, or none of one label."""
    pairs = [(_length(row.chosen), _length(row.rejected)) for row in rows if isinstance(row, Pair)]
    if pairs:
        chosen, rejected = np.array(pairs).T
        return Lengths(float((chosen > rejected).mean()), float((chosen < rejected).mean()), len(pairs))
    labelled = [row for row in rows if isinstance(row, Labelled)]
    good, bad = (np.sort([_length(row.answer) for row in labelled if row.desirable is kind]) for kind in (True, False))
    if not len(good) or not len(bad):
        return None
    below, upto = np.searchsorted(bad, good, "left"), np.searchsorted(bad, good, "right")
    return Lengths(float(below.mean() / len(bad)), float(1 - upto.mean() / len(bad)), len(labelled))


def _places(found: Iterable[str]) -> str:
    places = list(found)
    return f" ({', '.join(places[:_SHOWN])}{', ...' if len(places) > _SHOWN else ''})" if places else ""
