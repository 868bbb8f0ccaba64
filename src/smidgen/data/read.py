"""Data files, read row by row: each row comes with the line (Parquet: the row number) where it stands.

JSONL, JSON, CSV, TSV, Parquet and plain text. A row that cannot be read is answered as `Unreadable`, so that all bad
rows of a file can be told at once; a file that cannot be read raises.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from smidgen.errors import DataError, did_you_mean
from smidgen.foreign import DECODER, has_half_characters, shown

LONGEST_LINE = 8 * 2**20  # bytes
TEXT_PIECE = 2**20  # characters of a text file that make one row

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_HALF = "holds half of a character, such as \\ud800 alone"
_LONGEST_SKIPPED = 64 * 2**20  # bytes of one line
_NOT_SPACE = re.compile(r"\S")
_MOST = f"{LONGEST_LINE // 2**20} MiB"
_MOST_PARTS = 1_000_000  # row groups and columns of a Parquet file
_EXPANSION, _FREE_BYTES = 200, 64 * 2**20  # a file may unpack to so many times its size, and some bytes
_decode_json = DECODER.raw_decode


@dataclass(frozen=True)
class Unreadable:
    """What is wrong with a row."""

    problem: str


def data_files(path: str) -> list[Path]:
    """Answer the file at `path`, or the data files of the folder at `path` in the order of their names.

    Raises:
        DataError: nothing is there, or nothing of a known kind.
    """
    place = Path(path)
    if os.path.isdir(place):
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in _READERS and os.path.isfile(file))
        if not files:
            raise DataError(f"{path}: no data file in this folder; known kinds: {', '.join(_READERS)}")
        return files
    if os.path.exists(place) and not os.path.isfile(place):
        raise DataError(f"{path}: is not a regular file; copy what it gives into one")
    if not os.path.isfile(place):
        near = [file.name for file in place.parent.iterdir()] if os.path.isdir(place.parent) else []
        raise DataError(f"{path}: no such file{did_you_mean(place.name, near)}")
    if place.suffix.lower() not in _READERS:
        raise DataError(f"{path}: unknown kind of file '{place.suffix}'; known kinds: {', '.join(_READERS)}")
    return [place]


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Read a data file: pairs of a line number, counted from 1, and a row (usually a dict) or `Unreadable`.

    Raises:
        DataError: the file as a whole cannot be read: UTF-16, not JSON, no header, not Parquet.
    """
    with path.open("rb") as file:
        start = file.read(4)
        if start[:2] in _UTF16:
            raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
        file.seek(len(_BOM) if start[:3] == _BOM else 0)
        yield from _READERS[path.suffix.lower()](path, file)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str | Unreadable]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            yield number, Unreadable(f"line is longer than {_MOST}")
            skipped = 0
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
                skipped += len(line)
                if skipped > _LONGEST_SKIPPED:
                    raise DataError(
                        f"{path}:{number}: line is longer than {_LONGEST_SKIPPED // 2**20} MiB; is it text?"
                    )
            continue
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            yield number, Unreadable(f"not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8")
            continue
        if "\0" in text:
            yield number, Unreadable("holds a NUL character; the file is binary or damaged")
        else:
            yield number, text


def _jsonl(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path, file):
        if isinstance(line, Unreadable):
            yield number, line
        elif line := line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Any:
    try:
        value, end = _decode_json(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(_json_problem(error))
    if has_half_characters(line, value):
        return Unreadable(_HALF)
    return value if end == len(line) else Unreadable(f"more than one JSON value on the line (column {end + 1})")


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"bad JSON: {error.msg} (column {error.colno})"
    return "bad JSON: nested too deeply" if isinstance(error, RecursionError) else f"bad JSON: {shown(error)}"


def _json(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    start = file.tell()
    if file.read(4096).lstrip()[:1] == b"{":  # many a .json file holds a JSON value on each line
        file.seek(start)
        yield from _jsonl(path, file)
        return
    file.seek(start)
    text = _Window(path, file)
    if text.next() != "[":
        raise DataError(f"{path}:1: a JSON file must hold a list of rows, [{{...}}, {{...}}]")
    text.position += 1
    while text.next() != "]":
        yield text.line(), text.value()
        if text.next() == ",":
            text.position += 1
            text.next()
        elif text.next() != "]":
            raise DataError(f"{path}:{text.line()}: bad JSON: expected ',' or ']'")


class _Window:
    """The text of a JSON file, of which the part around `position` is in memory."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self.position = "", 0
        self._line, self._counted = 1, 0  # the number of the line at the place up to which line breaks were counted

    def line(self) -> int:
        self._line += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def next(self) -> str:
        """Go to the next character that is no white space and answer it; an empty text at the end."""
        while not (found := _NOT_SPACE.search(self._text, self.position)):
            self.position = len(self._text)
            if not self._more():
                return ""
        self.position = found.start()
        return found[0]

    def value(self) -> Any:
        """Answer the value that begins here and go to its end."""
        while True:
            try:
                value, end = _decode_json(self._text, self.position)
            except (ValueError, RecursionError) as error:
                cut_off = isinstance(error, json.JSONDecodeError)
                if cut_off and len(self._text) - self.position > LONGEST_LINE:
                    raise DataError(
                        f"{self._path}:{self.line()}: longer than {_MOST}, or {_json_problem(error)}"
                    ) from None
                if cut_off and self._more():
                    continue
                self.position = error.pos if isinstance(error, json.JSONDecodeError) else self.position
                raise DataError(f"{self._path}:{self.line()}: {_json_problem(error)}") from None
            if end == len(self._text) and self._more():  # the first digits of a number are a number
                continue
            if has_half_characters(self._text[self.position : end], value):
                value = Unreadable(_HALF)
            self.position = end
            return value

    def _more(self) -> bool:
        block = self._file.read(2**20)
        try:
            new = self._decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = self._file.tell() - len(block) + error.start
            raise DataError(f"{self._path}: not UTF-8 (byte {place}); save the file as UTF-8") from None
        if "\0" in new:
            raise DataError(f"{self._path}: holds a NUL character; the file is binary or damaged")
        self.line()
        self._text, self._counted, self.position = self._text[self.position :] + new, 0, 0
        return bool(block)


def _csv(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    bad: dict[int, Unreadable] = {}

    def good_lines() -> Iterator[str]:
        for number, line in _lines(path, file):
            if isinstance(line, Unreadable):
                bad[number] = line
                line = "\n"  # keeps the line count right; an empty line is no row
            yield line

    before = csv.field_size_limit(LONGEST_LINE)
    try:
        reader = csv.reader(good_lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        yield from _table(path, reader, bad)
    finally:
        csv.field_size_limit(before)


def _table(path: Path, reader: Any, bad: dict[int, Unreadable]) -> Iterator[tuple[int, Any]]:
    header: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, Unreadable(f"bad CSV: {error}")
            return  # after an open quotation mark nothing below can be told apart
        yield from ((number, bad.pop(number)) for number in sorted(bad))
        if cells is None:
            return
        if cells and header is None:
            if repeated := sorted(name for name, count in Counter(cells).items() if count > 1):
                raise DataError(f"{path}:{line}: columns named twice: {shown(', '.join(repeated))}")
            header = cells
        elif cells and header is not None:
            if len(cells) == len(header):
                yield line, dict(zip(header, cells, strict=True))
            else:
                yield line, Unreadable(f"{len(cells)} cells, but the header names {len(header)} columns")
        line = reader.line_num + 1


def _parquet(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    left = _EXPANSION * size + _FREE_BYTES
    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(
            path, thrift_string_size_limit=LONGEST_LINE, thrift_container_size_limit=_MOST_PARTS
        )
        for group in range(table.metadata.num_row_groups):
            for batch in table.iter_batches(
                _rows_at_once(path, table.metadata.row_group(group).total_byte_size), [group]
            ):
                left -= batch.nbytes
                if left < 0:
                    raise _bomb(path)
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {shown(error)}") from None


def _rows_at_once(path: Path, whole: int) -> int:
    """How many rows of a row group of `whole` bytes are decoded at once: one value may be most of it, in every row.

    The group's own size is all that may be asked for: Arrow ends the process over the damaged description of a column.
    """
    stored = path.stat().st_size
    if whole > _EXPANSION * stored + _FREE_BYTES:
        raise _bomb(path)
    likely = whole <= 20 * stored + _FREE_BYTES // 4
    return min(1024, max(4 if likely else 1, _FREE_BYTES // max(1, whole)))


def _bomb(path: Path) -> DataError:
    return DataError(
        f"{path}: refused: it unpacks to more than {_EXPANSION} times its size; save it as JSONL if it is meant so"
    )


def _text(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A text file is one document. A long one is cut into pieces, at empty lines where there are any."""
    lines: list[str] = []
    start, size, cut = 1, 0, 0
    for number, line in _lines(path, file):
        if isinstance(line, Unreadable):
            yield number, line
            continue
        lines.append(line)
        size += len(line)
        if not line.strip():
            cut = len(lines)
        if size >= TEXT_PIECE:
            cut = cut or len(lines)
            yield from _piece(start, lines[:cut])
            lines, start = lines[cut:], start + cut
            size, cut = sum(map(len, lines)), 0
    yield from _piece(start, lines)


def _piece(start: int, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    if (text := "".join(lines)).strip():
        yield start, {"text": text}


_READERS = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
