"""The data formats, detected by the fields of a file's first row, and how a row becomes a chat or a text.

A row of a wrong type is a mistake of the file (`BadRow`: all are told at once, and nothing is trained). A row that is
well formed but useless (roles out of order, an empty answer) is left out and counted (`Unusable`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from smidgen.data.images import BadImage, image_path, take_images
from smidgen.data.messages import (
    BadRow,
    Message,
    Unusable,
    add_system,
    check_order,
    kind_of,
    optional_text,
    read_message,
    read_tools,
    text_of,
)
from smidgen.data.read import Unreadable
from smidgen.errors import DataError, did_you_mean, raise_all
from smidgen.foreign import shown

_MOST_WRONG = 10_000  # rows of a file: after so many it is not read to the end


class Example(NamedTuple):
    """One row of data: the messages of a chat, or a text. `line` is its place in the file, `images` are paths."""

    line: int
    messages: list[Message]
    text: str | None = None
    tools: list[Any] | None = None
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Format:
    """A data format.

    needs: the fields that every row has; they tell the format.
    takes: further fields that are read where they stand.
    style: the prompt for tokenizers that have no chat template: 'alpaca', 'plain' (prompt, then completion) or 'text'.
    convert: line number and row to an `Example`, or to what the formats of another table give.
    """

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    style: str
    convert: Callable[[int, Mapping[str, Any]], Any]


def _exchange(line: int, system: str, earlier: Iterable[tuple[str, str]], prompt: str, completion: str) -> Example:
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for user, assistant in (*earlier, (prompt, completion)):
        if not user.strip():
            raise Unusable("empty prompt")
        if not assistant.strip():
            raise Unusable("empty completion")
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return Example(line, messages)


def _with_images(convert: Callable[[int, Mapping[str, Any]], Example]) -> Callable[[int, Mapping[str, Any]], Example]:
    """The same, with the images that the row's field 'images' names."""

    def convert_images(line: int, row: Mapping[str, Any]) -> Example:
        example = convert(line, row)
        return example._replace(images=take_images(row, example.messages, ()))

    return convert_images


def _join(instruction: str, more: str) -> str:
    return f"{instruction}\n\n{more}" if more.strip() else instruction


def _alpaca(line: int, row: Mapping[str, Any]) -> Example:
    prompt = _join(text_of(row, "instruction"), optional_text(row, "input"))
    return _exchange(line, optional_text(row, "system"), _history(row), prompt, text_of(row, "output"))


def _history(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"field 'history' must be a list of [prompt, completion], got {kind_of(history)}")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("field 'history' must be a list of [prompt, completion] texts")
    return [(prompt, completion) for prompt, completion in history]


def _dolly(line: int, row: Mapping[str, Any]) -> Example:
    prompt = _join(text_of(row, "instruction"), optional_text(row, "context"))
    return _exchange(line, "", (), prompt, text_of(row, "response"))


def _pair(prompt: str, completion: str) -> Format:
    def convert(line: int, row: Mapping[str, Any]) -> Example:
        return _exchange(line, optional_text(row, "system"), (), text_of(row, prompt), text_of(row, completion))

    return Format(f"{prompt}/{completion}", (prompt, completion), ("system", "images"), "plain", _with_images(convert))


def _plain_text(line: int, row: Mapping[str, Any]) -> Example:
    text = text_of(row, "text")
    if not text.strip():
        raise Unusable("empty text")
    return Example(line, [], text)


def _chat(name: str) -> Callable[[int, Mapping[str, Any]], Example]:
    def convert(line: int, row: Mapping[str, Any]) -> Example:
        turns = row.get(name)
        if not isinstance(turns, list):
            raise BadRow(f"field '{name}' must be a list of messages, got {kind_of(turns)}")
        named: list[str | None] = []
        messages = [read_message(f"{name}[{index}]", turn, named) for index, turn in enumerate(turns)]
        images = take_images(row, messages, named)
        add_system(messages, row)
        check_order(messages)
        return Example(line, messages, None, read_tools(row), images)

    return convert


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("messages", ("messages",), ("tools", "system", "images"), "alpaca", _chat("messages")),
        Format("sharegpt", ("conversations",), ("tools", "system", "images"), "alpaca", _chat("conversations")),
        Format(
            "alpaca",
            ("instruction", "output"),
            ("input", "history", "system", "images"),
            "alpaca",
            _with_images(_alpaca),
        ),
        Format("dolly", ("instruction", "response"), ("context",), "alpaca", _dolly),
        _pair("instruction", "command"),
        _pair("prompt", "completion"),
        _pair("prompt", "response"),
        _pair("question", "answer"),
        _pair("query", "response"),
        _pair("input", "output"),
        Format("text", ("text",), (), "text", _plain_text),
    )
}


def detect_format(
    fields: Iterable[str], where: str, *, prefer_text: bool = False, formats: Mapping[str, Format] = FORMATS
) -> Format:
    """Answer the first format of the table whose fields are all among `fields`; with `prefer_text`, text where it fits.

    Raises:
        DataError: there is none.
    """
    present = set(fields)
    if prefer_text and "text" in present:
        return FORMATS["text"]
    for format in formats.values():
        if present.issuperset(format.needs):
            return format
    known = "; ".join(f"{format.name}: {', '.join(format.needs)}" for format in formats.values())
    raise DataError(
        f"{where}: no known format has the fields {shown(', '.join(sorted(present))) or '(none)'}. Known: {known}. "
        "Fix: name the fields with 'columns', for example columns: {prompt: title, completion: body}"
    )


def named_format(name: str, formats: Mapping[str, Format] = FORMATS) -> Format:
    """Answer the format called `name`.

    Raises:
        DataError: there is none.
    """
    if name not in formats:
        raise DataError(f"data.format: no '{name}'{did_you_mean(name, formats)}. There are: {', '.join(formats)}.")
    return formats[name]


@dataclass
class Tally:
    """Lines under the same words: of each kind of problem, where it was seen."""

    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, words: str, place: str) -> None:
        self.lines.setdefault(words, []).append(place)

    def count(self) -> int:
        """How many in all."""
        return sum(map(len, self.lines.values()))

    def problems(self, path: str) -> list[str]:
        """A line for each kind: the first place, the words, and how many others there are."""
        return [f"{path}:{places[0]}: {words}.{_others(places)}" for words, places in self.lines.items()]


@dataclass
class FileRows:
    """What was found in one file."""

    path: str
    format: Format
    examples: list[Any]  # what the format gives, an Example for each row
    unusable: Tally
    ignored: Counter[str]  # unknown fields, and in how many rows


def convert_rows(
    path: str,
    rows: Iterator[tuple[int, Any]],
    *,
    format: Format | None,
    columns: Mapping[str, str] | None = None,
    prefer_text: bool = False,
    formats: Mapping[str, Format] = FORMATS,
) -> FileRows:
    """Convert the rows of one file.

    Args:
        format: None: detected from the first row.
        columns: our name of a field -> the file's name; where given, no other field is read.
        formats: the table that the format is in.

    Raises:
        DataError: a line for each kind of mistake, naming the first row and counting the others.
    """
    examples: list[Any] = []
    unusable, bad = Tally(), Tally()
    ignored: Counter[str] = Counter()
    known: frozenset[str] = frozenset()
    wrong = 0
    for line, row in rows:
        if not isinstance(row, dict):
            bad.add(
                row.problem if isinstance(row, Unreadable) else f"a row must be an object, got {kind_of(row)}",
                str(line),
            )
            wrong += 1
            if wrong == _MOST_WRONG:
                break
            continue
        if columns:
            row = {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        if not known:
            format = format or detect_format(row, f"{path}:{line}", prefer_text=prefer_text, formats=formats)
            known = frozenset((*format.needs, *format.takes))
        assert format is not None
        try:
            example = format.convert(line, row)
            if images := getattr(example, "images", ()):
                example = example._replace(images=tuple(image_path(Path(path).parent, name) for name in images))
        except (BadRow, BadImage) as problem:
            bad.add(str(problem), str(line))
            wrong += 1
            if wrong == _MOST_WRONG:
                break
        except Unusable as reason:
            unusable.add(str(reason), str(line))
        else:
            examples.append(example)
            if extra := row.keys() - known:
                ignored.update(extra)
    if wrong == _MOST_WRONG:
        bad.add(f"{wrong:,} rows are wrong; the file was read no further", str(line))
    raise_all(DataError, bad.problems(path))
    if format is None:
        raise DataError(f"{path}: the file holds no rows")
    return FileRows(path, format, examples, unusable, ignored)


def _others(places: list[str]) -> str:
    if len(places) == 1:
        return ""
    shown = ", ".join(places[:10]) + (", ..." if len(places) > 10 else "")
    return f" ({len(places):,} rows like this: {shown})"
