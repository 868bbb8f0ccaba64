"""Compositions: how several adapters answer together. The names are adapter-hub's.

`Stack`, `Average` and `Fuse` answer at each adapted module by itself; `Parallel` answers the whole call once for each
of its parts, in one batch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from smidgen.errors import UsageError

# Names of adapters and averages of chains, lowest first.
Chain: TypeAlias = tuple[Any, ...]


class Composition:
    """Adapters by name, or compositions of them, that answer together."""

    def __init__(self, *parts: str | Composition):
        if not parts or not all(isinstance(part, str | Composition) for part in parts):
            raise UsageError(f"{type(self).__name__}: takes names of adapters and compositions, got {parts!r}")
        self.parts = parts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.parts))})"

    def names(self) -> list[str]:
        """The adapters in it, each once."""
        parts = [[part] if isinstance(part, str) else part.names() for part in self.parts]
        return list(dict.fromkeys(name for names in parts for name in names))

    def fused(self) -> list[list[str]]:
        """The adapters of each fusion in it."""
        return [names for part in self.parts if not isinstance(part, str) for names in part.fused()]

    def chain(self) -> Chain:
        """What answers at a module, lowest first."""
        return tuple(link for part in self.parts for link in chain_of(part))

    def branches(self) -> list[Chain]:
        """What answers, for each copy of the rows of a call."""
        return [self.chain()]


class Stack(Composition):
    """Each part stands above those before it."""


class Parallel(Composition):
    """Each part answers all rows: those of the first part come first, then those of the second."""

    def chain(self) -> Chain:
        raise UsageError(
            f"{self!r}: Parallel holds other compositions and stands in none: write "
            "Parallel(Stack('a', 'b'), Stack('a', 'c')) for Stack('a', Parallel('b', 'c'))"
        )

    def branches(self) -> list[Chain]:
        return [chain_of(part) for part in self.parts]


class Average(Composition):
    """At each module the mean of what the parts answer there; one that does not stand there answers as without it.

    Args:
        weights: one for each part; they are divided by their sum. Left out, all are equal.
    """

    def __init__(self, *parts: str | Composition, weights: Sequence[float] | None = None):
        super().__init__(*parts)
        weights = [1.0] * len(parts) if weights is None else list(weights)
        total = math.fsum(weights)
        if len(weights) != len(parts) or not math.isfinite(total) or abs(total) < 1e-6:
            raise UsageError(f"Average: weights: needs one for each of {len(parts)} parts, and a sum, got {weights}")
        self.weights = tuple(weight / total for weight in weights)

    def chain(self) -> Chain:
        return (Mean(tuple(map(chain_of, self.parts)), self.weights),)


class Fuse(Composition):
    """AdapterFusion over adapters: one more adapter, trained, chooses among their outputs for each token."""

    def __init__(self, *parts: str):
        super().__init__(*parts)
        if len(parts) < 2 or not all(isinstance(part, str) for part in parts):
            raise UsageError(f"{self!r}: takes two names of adapters or more")

    def fused(self) -> list[list[str]]:
        return [self.names()]

    def chain(self) -> Chain:
        return (",".join(self.names()),)  # what the adapter that chooses is called


class Mean(NamedTuple):
    """The link of a chain that is an average of chains."""

    chains: tuple[Chain, ...]
    weights: tuple[float, ...]


def chain_of(part: str | Composition) -> Chain:
    """What answers at a module where `part` is active."""
    return (part,) if isinstance(part, str) else part.chain()


def links_of(chain: Chain) -> list[str]:
    """The names of the adapters in a chain, each once."""
    return list(dict.fromkeys(_flat(chain)))


def repeated(chain: Chain) -> list[str]:
    """The names that stand in a chain more than once."""
    return [name for name, count in Counter(_flat(chain)).items() if count > 1]


def _flat(chain: Chain) -> Iterator[str]:
    for link in chain:
        yield from (link,) if isinstance(link, str) else (name for part in link.chains for name in _flat(part))


def weighted(answers: Sequence[Any], weights: Sequence[float]) -> Any:
    """The sum of answers of one module times their weights, tuples part by part; what is the same for all stays it."""
    first = answers[0]
    if all(answer is first for answer in answers):
        return first
    if isinstance(first, tuple):
        return tuple(weighted(parts, weights) for parts in zip(*answers, strict=True))
    if not isinstance(first, Tensor):
        return first
    return sum(weight * answer for weight, answer in zip(weights, answers, strict=True))


def has_rows(value: Any, count: int) -> bool:
    """Whether a value is a tensor with something for each of `count` rows; a list of numbers is none."""
    return isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == count


def pick_rows(value: Any, count: int, indices: list[int]) -> Any:
    """Some rows of every tensor with `count` rows in `value`."""
    if isinstance(value, tuple | list):
        return tuple(pick_rows(part, count, indices) for part in value)
    return value[indices] if has_rows(value, count) else value


_OF_ROWS = ("labels", "start_positions", "end_positions")  # may have one number for each row


def repeat_rows(times: int, args: tuple, kwargs: dict[str, Any]) -> tuple[int, tuple, dict[str, Any]]:
    """The arguments of a model's call with all rows `times` times, one copy after the other, and how many they were."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if first is None:
        raise UsageError("Parallel: the call has no tensor whose rows could be repeated")
    count = len(first)

    def copies(value: Any, always: bool = False) -> Any:
        if has_rows(value, count) or (always and isinstance(value, Tensor) and value.shape == (count,)):
            return value.repeat(times, *[1] * (value.dim() - 1))
        return value

    named = {name: copies(value, name in _OF_ROWS) for name, value in kwargs.items()}
    return count, tuple(map(copies, args)), named
