"""From the data part of a recipe to tokenised rows, checked, cached and accounted for."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.data import check
from smidgen.data.check import DataReport, FileReport, SetReport, Size
from smidgen.data.formats import Example, FileRows, Tally, convert_rows, named_format
from smidgen.data.images import ImageReader
from smidgen.data.mixing import held_out, mix
from smidgen.data.read import data_files, read_rows
from smidgen.data.rows import TokenRows
from smidgen.data.templates import ChatTemplate, choose_template
from smidgen.data.tokenise import Cuts, Encoder, Left, Piece, Tokeniser
from smidgen.errors import DataError, raise_all
from smidgen.recipe import DataRecipe, Source

_VERSION = 1  # of the way rows are made: a new one makes old caches stale
_PLACES = 5

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What training needs of its data.

    train, eval: `TokenRows`; of a task with labels, `TaskRows`.
    template: the exact text of the chat template that was used, to be saved beside what is trained; None: texts only.
    """

    train: Any
    eval: Any
    report: DataReport
    template: str | None


def prepare_data(
    data: DataRecipe,
    tokenizer: Any,
    *,
    objective: str = "sft",
    seed: int = 42,
    cache_dir: Path | None = None,
    stop_ids: set[int],
    images: ImageReader | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Read, check and tokenise the data of a recipe.

    Args:
        tokenizer: a fast tokenizer of transformers.
        objective: 'sft' (answers are learned) or 'pretrain' (everything is).
        seed: for what is held out and for mixtures; nothing else is random.
        cache_dir: where tokens are kept for the next run; None: nowhere.
        stop_ids: the tokens at which the model stops.
        images: of a model that takes images. Rows with images are made anew each time: their files may have changed.
        progress: gets a line about once a second.

    Raises:
        DataError: files or rows are wrong, no token would be learned, or no stop token would.
    """
    weights = _weights(data.train)
    check_eval(data)
    maker = _Maker(data, tokenizer, objective, cache_dir, stop_ids, images, progress)
    train, train_report = maker.rows(data.train)
    check.require_supervised(train, train_report)
    if objective == "sft":
        check.require_stop(train, stop_ids, tokenizer)
    check.require_one_bos(train, maker.encoder.bos)

    evaluation, eval_report = None, None
    if data.eval:
        evaluation, eval_report = maker.rows(data.eval)
        check.require_supervised(evaluation, eval_report)
    elif data.eval_size is not None:
        kept, held = held_out(len(train), data.eval_size, seed=seed)
        if not len(kept):
            raise DataError(f"data.eval_size: {data.eval_size} leaves none of {len(train):,} rows to train on")
        train, evaluation = train.select(kept), train.select(held)

    repeated = len(train) - len(np.unique(train.digest[train.order]))
    overlap = 0
    if evaluation is not None:
        overlap = int(np.isin(evaluation.digest[evaluation.order], train.digest[train.order]).sum())
    mixture: list[str] = []
    if weights:
        train, mixture = _mixed(train, data.train, maker.source_of_file, weights, seed)
    report = DataReport(
        template=maker.template.origin if maker.template else "none; the data are texts",
        max_length=data.max_length,
        train=train_report,
        eval=eval_report,
        train_size=Size.of(train),
        eval_size=Size.of(evaluation) if evaluation is not None else None,
        duplicates=repeated,
        overlap=overlap,
        histogram=check.histogram(train.lengths),
        samples=check.samples(train, tokenizer),
        mixture=mixture,
    )
    return Prepared(train, evaluation, report, maker.template.text if maker.template else None)


def check_eval(data: DataRecipe) -> None:
    """Raise `DataError` where what is said about evaluation data contradicts itself."""
    if data.eval and any(source.weight is not None for source in data.eval):
        raise DataError("data.eval: weights are for training data; evaluation takes every row once")
    if data.eval and data.eval_size is not None:
        raise DataError("data: give eval or eval_size, not both")


def _weights(sources: Sequence[Source]) -> list[float]:
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) != len(sources):
        without = ", ".join(source.path for source in sources if source.weight is None)
        raise DataError(f"data.train: either every source has a weight or none has; without: {without}")
    return weights


def _mixed(
    rows: TokenRows, sources: Sequence[Source], source_of_file: list[int], weights: list[float], seed: int
) -> tuple[TokenRows, list[str]]:
    source = np.asarray(source_of_file)[rows.file[rows.order]]
    chosen = mix(rows.lengths, source, weights, seed=seed)
    mixed = rows.select(chosen)
    if not len(mixed):
        raise DataError("data.train: the mixture is empty; give the sources weights that their rows can fill")
    total = mixed.lengths.sum()
    lines = []
    for index, part in enumerate(sources):
        taken = source[chosen] == index
        tokens, whole = int(mixed.lengths[taken].sum()), int((source == index).sum())
        count = int(taken.sum())
        lines.append(f"  mixture {part.path}: {tokens:,} tokens, {tokens / total:.1%}; {count:,} rows out of {whole:,}")
    return mixed, lines


class _Maker:
    """Makes the rows of one set after the other, with one template."""

    def __init__(
        self,
        data: DataRecipe,
        tokenizer: Any,
        objective: str,
        cache_dir: Path | None,
        stop_ids: set[int],
        images: ImageReader | None,
        progress: Progress | None,
    ) -> None:
        self.images = images
        self.data, self.tokenizer, self.objective = data, tokenizer, objective
        self.cache_dir, self.stop_ids, self.progress = cache_dir, stop_ids, progress
        self.encoder = Encoder(tokenizer)
        self.format = named_format(data.format) if data.format else None
        self.template: ChatTemplate | None = None
        own = data.template or tokenizer.chat_template
        self._own_template = choose_template(tokenizer, data.template, "") if own else None
        self.source_of_file: list[int] = []

    def rows(self, sources: Sequence[Source]) -> tuple[TokenRows, SetReport]:
        """The rows of some sources, from the cache where they are in it."""
        files = [(path, source) for source in sources for path in data_files(source.path)]
        self.source_of_file = self.source_of_file or [sources.index(source) for _, source in files]
        folder = self.cache_dir / self._key(files) if self.cache_dir else None
        if folder and folder.is_dir():
            rows, notes = TokenRows.load(folder)
            self._choose(notes["style"])
            return rows, _report(notes)
        with no_garbage_collection():
            rows, notes = self._make(files)
        if folder and not rows.images:
            rows.save(folder, notes)
        return rows, _report({**notes, "cached": False})

    def _choose(self, style: str) -> None:
        """Choose the template when the first chats are met; texts need none."""
        if style and self.template is None:
            self.template = self._own_template or choose_template(self.tokenizer, None, style)

    def _key(self, files: Sequence[tuple[Path, Source]]) -> str:
        """A hash of all that the rows depend on."""
        data = dataclasses.asdict(self.data)
        for other in ("train", "eval", "eval_size", "packing"):
            del data[other]
        depends = {
            "version": _VERSION,
            "data": data,
            "files": [(str(path), source.columns, _hash_file(path)) for path, source in files],
            "tokenizer": self.encoder.fingerprint(),
            "template": template.text if (template := self._own_template or self.template) else None,
            "special": self.tokenizer.special_tokens_map,
            "stop": sorted(self.stop_ids),
            "objective": self.objective,
            "images": self.images is not None,
        }
        return hashlib.blake2b(json.dumps(depends, default=str).encode(), digest_size=16).hexdigest()

    def _make(self, files: Sequence[tuple[Path, Source]]) -> tuple[TokenRows, dict[str, Any]]:
        found = self._read(files)
        style = prompt_style(found)
        self._choose(style)
        tokeniser = Tokeniser(
            self.tokenizer,
            self.template,
            stop_ids=self.stop_ids,
            learn_all=self.objective == "pretrain" or self.data.train_on == "all",
            max_length=self.data.max_length,
            on_long=self.data.on_long,
            images=self.images,
        )
        rows, reports = make_rows(found, lambda file: tokeniser.pieces(file.examples), self.progress)
        notes = {
            "files": [dataclasses.asdict(report) for report in reports],
            "cuts": dataclasses.asdict(tokeniser.cuts),
            "prompts": check.same_prompts(tokeniser, [example for file in found for example in file.examples]),
            "style": style,
        }
        return rows, notes

    def _read(self, files: Sequence[tuple[Path, Source]]) -> list[FileRows]:
        """All files; what is wrong with each is told at once."""
        found, problems = [], []
        for path, source in files:
            try:
                file = convert_rows(
                    str(path),
                    islice(read_rows(path), self.data.limit),
                    format=self.format,
                    columns=source.columns,
                    prefer_text=self.objective == "pretrain",
                )
            except DataError as error:
                problems.append(str(error))
                continue
            if self.data.system:
                _add_system(file.examples, self.data.system)
            found.append(file)
        raise_all(DataError, problems)
        return found


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Rows and their rendering make no cycles; looking for some among millions of rows takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def prompt_style(files: Sequence[FileRows]) -> str:
    """The style of the prompts where the tokenizer has no template; an empty text where there are texts alone."""
    styles = {file.format.style for file in files} - {"text"}
    return "alpaca" if "alpaca" in styles else "plain" if styles else ""


def make_rows(
    files: Sequence[FileRows],
    pieces_of: Callable[[FileRows], Iterator[list[Piece | Left]]],
    progress: Progress | None,
) -> tuple[TokenRows, list[FileReport]]:
    """Tokenise the rows of files; `pieces_of` does it for one file, chunk by chunk.

    Raises:
        DataError: rows that must not be left out; all are told at once.
    """
    store = RowStore()
    mistakes: list[str] = []
    clock = _Clock(progress, sum(len(file.examples) for file in files))
    reports = []
    for number, file in enumerate(files):
        left = Tally(dict(file.unusable.lines))
        wrong = Tally()
        for pieces in pieces_of(file):
            clock.tick(file.path, pieces)
            store.add(number, [piece for piece in pieces if isinstance(piece, Piece)])
            for piece in pieces:
                if isinstance(piece, Left):
                    (wrong if piece.mistake else left).add(piece.reason, str(piece.line))
        mistakes += wrong.problems(file.path)
        reports.append(
            FileReport(
                file.path,
                file.format.name,
                len(file.examples) + file.unusable.count(),
                dict(file.ignored),
                {reason: (len(lines), lines[:_PLACES]) for reason, lines in left.lines.items()},
            )
        )
    raise_all(DataError, mistakes)
    return store.rows([file.path for file in files]), reports


def _add_system(examples: list[Example], system: str) -> None:
    for example in examples:
        if example.messages and example.messages[0]["role"] != "system":
            example.messages.insert(0, {"role": "system", "content": system})


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _report(notes: dict[str, Any]) -> SetReport:
    files = [FileReport(**file) for file in notes["files"]]
    return SetReport(files, Cuts(**notes["cuts"]), tuple(notes["prompts"]), notes.get("cached", True))


class RowStore:
    """Collects pieces as flat arrays."""

    def __init__(self) -> None:
        self._chunks: list[tuple[np.ndarray, ...]] = []
        self._images: dict[int, tuple[str, ...]] = {}

    def add(self, file: int, pieces: list[Piece]) -> None:
        lengths = np.fromiter((len(piece.ids) for piece in pieces), np.int64, len(pieces))
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        ids = np.fromiter(chain.from_iterable(piece.ids for piece in pieces), np.int32, total)
        learned = np.zeros(total, dtype=bool)
        starts = (ends - lengths).tolist()
        for start, piece in zip(starts, pieces, strict=True):
            for first, end in piece.learned:
                learned[start + first : start + end] = True
        raw = ids.tobytes()
        named_images = ("\0".join(piece.images).encode() for piece in pieces)
        stored = sum(len(chunk[2]) for chunk in self._chunks)
        self._images |= {stored + place: piece.images for place, piece in enumerate(pieces) if piece.images}
        digests = (
            int.from_bytes(hashlib.blake2b(raw[4 * start : 4 * end] + named, digest_size=8).digest(), "little")
            for start, end, named in zip(starts, ends.tolist(), named_images, strict=True)
        )
        self._chunks.append(
            (
                ids,
                learned,
                lengths,
                np.full(len(pieces), file, dtype=np.int32),
                np.fromiter((piece.line for piece in pieces), np.int64, len(pieces)),
                np.fromiter((piece.state for piece in pieces), np.uint8, len(pieces)),
                np.fromiter(digests, np.uint64, len(pieces)),
            )
        )

    def rows(self, files: list[str]) -> TokenRows:
        if not self._chunks:
            self.add(0, [])
        ids, learned, lengths, file, line, state, digest = map(np.concatenate, zip(*self._chunks, strict=True))
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        order = np.arange(len(lengths))
        return TokenRows(ids, learned, offsets, file, line, state, digest, tuple(files), order, self._images)


class _Clock:
    """Says how far tokenising is, about once a second."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._start = self._told = time.monotonic()
        self._rows = self._tokens = 0

    def tick(self, path: str, pieces: list[Piece | Left]) -> None:
        self._rows += len({piece.line for piece in pieces})
        self._tokens += sum(len(piece.ids) for piece in pieces if isinstance(piece, Piece))
        now = time.monotonic()
        if self._progress and (now - self._told >= 1 or self._rows == self._total):
            seconds = max(1e-9, now - self._start)
            self._told = now
            self._progress(
                f"tokenising {path}: {self._rows:,}/{self._total:,} rows, {self._rows / seconds:,.0f} rows/s, "
                f"{self._tokens / seconds:,.0f} tokens/s"
            )
