"""Data files, read row by row: each row comes with the line (Parquet: the row number) where it stands.

JSONL, JSON, CSV, TSV, Parquet and plain text. A row that cannot be read is answered as `Unreadable`, so that all bad
rows of a file can be told at once; a file that cannot be read raises.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from smidgen.errors import DataError, did_you_mean

LONGEST_LINE = 32 * 2**20  # bytes
TEXT_PIECE = 2**20  # characters of a text file that make one row

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BOM = b"\xef\xbb\xbf"
_NOT_SPACE = re.compile(r"\S")
_decode_json = json.JSONDecoder().raw_decode


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
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in _READERS and file.is_file())
        if not files:
            raise DataError(f"{path}: no data file in this folder; known kinds: {', '.join(_READERS)}")
        return files
    if not place.is_file():
        near = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
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


def _lines(file: BinaryIO) -> Iterator[tuple[int, str | Unreadable]]:
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            yield number, Unreadable(f"line is longer than {LONGEST_LINE // 2**20} MiB")
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)
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
    for number, line in _lines(file):
        if isinstance(line, Unreadable):
            yield number, line
        elif line := line.strip():
            yield number, _parse(line)


def _parse(line: str) -> Any:
    try:
        value, end = _decode_json(line)
    except (ValueError, RecursionError) as error:
        return Unreadable(_json_problem(error))
    return value if end == len(line) else Unreadable(f"more than one JSON value on the line (column {end + 1})")


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"bad JSON: {error.msg} (column {error.colno})"
    return "bad JSON: nested too deeply" if isinstance(error, RecursionError) else f"bad JSON: {error}"


def _json(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    start = file.tell()
    if file.read(4096).lstrip()[:1] == b"{":  # many a .json file holds a JSON value on each line
        file.seek(start)
        yield from _jsonl(path, file)
        return
    file.seek(start)
    try:
        text = file.read().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    position = _skip(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{path}:1: a JSON file must hold a list of rows, [{{...}}, {{...}}]")
    line, counted = 1, 0
    position = _skip(text, position + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = _decode_json(text, position)
        except (ValueError, RecursionError) as error:
            place = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}:{place}: {_json_problem(error)}") from None
        yield line, value
        position = _skip(text, position)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{path}:{line + text.count(chr(10), counted, position)}: bad JSON: expected ',' or ']'")


def _skip(text: str, position: int) -> int:
    found = _NOT_SPACE.search(text, position)
    return found.start() if found else len(text)


def _csv(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    bad: dict[int, Unreadable] = {}

    def good_lines() -> Iterator[str]:
        for number, line in _lines(file):
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
            if repeated := sorted({name for name in cells if cells.count(name) > 1}):
                raise DataError(f"{path}:{line}: columns named twice: {', '.join(repeated)}")
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

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=4096):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _text(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """A text file is one document. A long one is cut into pieces, at empty lines where there are any."""
    lines: list[str] = []
    start, size, cut = 1, 0, 0
    for number, line in _lines(file):
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
