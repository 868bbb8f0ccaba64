"""Tokenised rows: flat arrays, in memory or mapped from a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.errors import DataError
from smidgen.foreign import read_object, shown

COMPLETE, PROMPT_CUT, ENDING_LOST, TEXT = 0, 1, 2, 3  # TokenRows.state

_ARRAYS = ("ids", "learned", "offsets", "file", "line", "state", "digest")


@dataclass(frozen=True)
class TokenRow:
    """One row: T token ids, which of them are learned (bool), the place it comes from, the paths of its images."""

    input_ids: np.ndarray
    supervised: np.ndarray
    where: str
    images: tuple[str, ...] = ()

    @property
    def prompt_length(self) -> int:
        """How many tokens stand before the last learned stretch; all of them where nothing is learned."""
        learned = np.flatnonzero(self.supervised)
        if not len(learned):
            return len(self.input_ids)
        breaks = np.flatnonzero(np.diff(learned) > 1)
        return int(learned[breaks[-1] + 1] if len(breaks) else learned[0])


@dataclass(frozen=True)
class TokenRows(Sequence[TokenRow]):
    """Rows of token ids, as flat arrays of all tokens with an index of rows over them.

    ids: int32, all tokens; learned: bool, one for each.
    offsets: int64, where the stored rows begin, and the end of the last.
    file, line, state, digest: one for each stored row: index into `files`, line, COMPLETE..., a hash of the ids.
    order: which stored rows these are; a row may stand in it more than once (mixtures).
    images: of the stored rows that have some, the paths. Such rows are not kept in a cache.
    """

    ids: np.ndarray
    learned: np.ndarray
    offsets: np.ndarray
    file: np.ndarray
    line: np.ndarray
    state: np.ndarray
    digest: np.ndarray
    files: tuple[str, ...]
    order: np.ndarray
    images: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> TokenRow:  # type: ignore[override]
        stored = self.order[index]
        part = slice(self.offsets[stored], self.offsets[stored + 1])
        where = f"{self.files[self.file[stored]]}:{self.line[stored]}"
        return TokenRow(self.ids[part], self.learned[part], where, self.images.get(int(stored), ()))

    def __iter__(self) -> Iterator[TokenRow]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(self.offsets)[self.order]

    @cached_property
    def supervised_counts(self) -> np.ndarray:
        """Of each row, how many tokens carry loss; the first token never does, nothing predicts it."""
        sums = np.concatenate(([0], np.cumsum(self.learned, dtype=np.int64)))
        first = self.learned[np.minimum(self.offsets[:-1], max(0, len(self.learned) - 1))]
        return (np.diff(sums[self.offsets]) - first)[self.order]

    @property
    def rows(self) -> TokenRows:
        """Itself: what rows of other kinds are made of."""
        return self

    @property
    def wanted(self) -> TokenRows:
        """The rows whose answers are to be given, all of them; of pairs the chosen ones."""
        return self

    @property
    def fingerprint(self) -> str:
        """What tells these rows, in this order, from others."""
        return hashlib.sha256(self.digest[self.order].tobytes()).hexdigest()

    def select(self, indices: np.ndarray) -> TokenRows:
        """Answer the rows at these indices, in this order, over the same arrays."""
        return replace(self, order=self.order[indices])

    def first(self, tokens: int) -> TokenRows:
        """Answer the first rows, none with images, that have so many tokens together.

        The last is cut, or left out where a single token of it would stay.
        """
        ends = np.minimum(np.cumsum(self.lengths), tokens)
        starts = np.concatenate(([0], ends[:-1]))
        kept = int((ends - starts >= np.minimum(2, self.lengths)).sum())
        chosen = self.order[:kept]
        offsets = np.concatenate(([0], ends[:kept]))
        begins = np.repeat(self.offsets[chosen] - offsets[:-1], np.diff(offsets))
        places = begins + np.arange(offsets[-1])
        parts = {name: getattr(self, name)[chosen] for name in ("file", "line", "state", "digest")}
        return replace(
            self, ids=self.ids[places], learned=self.learned[places], offsets=offsets, order=np.arange(kept), **parts
        )

    def save(self, folder: Path, notes: Any) -> None:
        """Write arrays and JSON notes to a new folder: completely, or not at all."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
        draft.mkdir()
        try:
            for name in _ARRAYS:
                np.save(draft / f"{name}.npy", getattr(self, name), allow_pickle=False)
            text = json.dumps({"files": self.files, "notes": notes}, ensure_ascii=False)
            (draft / "rows.json").write_text(text, encoding="utf-8")
            os.replace(draft, folder)
        except OSError:
            if not folder.is_dir():  # else another process wrote the same rows meanwhile
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> tuple[TokenRows, Any]:
        """Answer the rows and notes of a folder; the arrays stay on disk and are mapped into memory.

        Raises:
            DataError: a file is missing, or is not what `save` writes.
        """
        try:
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in _ARRAYS}
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise DataError(f"{folder}: damaged tokens ({shown(error)}); delete this folder") from None
        kept = read_object(folder / "rows.json", DataError)
        order = np.arange(len(arrays["offsets"]) - 1)
        return cls(**arrays, files=tuple(kept["files"]), order=order), kept["notes"]
