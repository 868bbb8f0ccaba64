"""Files of others, read within bounds: text, JSON, and which names may stand in a folder.

What a folder from elsewhere holds is data that somebody made up. Nothing here runs code, follows a name out of its
folder, or takes more memory than a few times the bound.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

LARGEST_JSON = 16 * 2**20  # bytes
DEEPEST = 64  # levels of lists and objects
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # endings of files that are never read
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # mostly the half of a character whose other half is beside it
_LONGEST_NUMBER = 40  # digits
_SHOWN = 200  # characters


def read_text(path: Path, error: type[Exception], largest: int) -> str:
    """Answer the text of a UTF-8 file; a byte order mark is left out.

    Raises:
        error: there is no such file, it is no regular file, larger than `largest` bytes, not UTF-8, or holds NUL.
    """
    if not os.path.isfile(path):  # neither a pipe nor a device, which would never end
        raise error(f"{path}: {'is not a regular file' if os.path.exists(path) else 'no such file'}")
    if (size := path.stat().st_size) > largest:
        raise error(f"{path}: {size:,} bytes; larger than {largest:,} bytes, such a file is not read")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not UTF-8 (byte {problem.start}); save the file as UTF-8") from None
    except OSError as problem:
        raise error(f"{path}: cannot be read: {problem.strerror}") from None
    if "\0" in text:
        raise error(f"{path}: holds a NUL character; the file is binary or damaged")
    return text


def read_object(path: Path, error: type[Exception], *, largest: int = LARGEST_JSON) -> dict[str, Any]:
    """Answer the JSON object that a file holds.

    Raises:
        error: as `read_text`, or the text is not one JSON object, as in `parse_json`.
    """
    value = parse_json(read_text(path, error, largest), str(path), error)
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object, {{...}}, got a {type(value).__name__}")
    return value


def parse_json(text: str | bytes, place: str, error: type[Exception]) -> Any:
    """Answer the value of a JSON text; `place` is named in errors.

    Raises:
        error: it is not JSON, names a field twice, is nested deeper than `DEEPEST`, or holds a number beyond bounds.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = DECODER.decode(text)
    except RecursionError:
        raise error(f"{place}: nested too deeply") from None
    except (ValueError, MemoryError) as problem:
        raise error(f"{place}: not valid JSON: {shown(problem)}") from None
    if has_half_characters(text, value):
        raise error(f"{place}: holds half of a character, such as \\ud800 alone")
    level = [value]
    for _ in range(DEEPEST):
        level = [item for part in level if isinstance(part, dict | list) for item in _items(part)]
        if not level:
            return value
    raise error(f"{place}: nested too deeply, more than {DEEPEST} levels")


def has_half_characters(text: str, value: Any) -> bool:
    """Whether the value of a JSON text holds surrogates, halves of characters, that have no other half beside them."""
    return bool(_SURROGATE.search(text)) and not is_unicode(json.dumps(value, ensure_ascii=False))


def is_unicode(text: str) -> bool:
    """Whether a text can be written: one with half of a character cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def contained(folder: Path, name: Any, error: type[Exception]) -> Path:
    """Answer the file called `name` in `folder`, after making sure that it lies there.

    A symlink may lead to another file of the folder, or, in the hub's cache, to the blobs of the same model.

    Raises:
        error: the name is no plain file name, or leads out of the folder.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set('/\\:\0"*?<>|')
    if not plain or PureWindowsPath(name).name != name:
        raise error(f"{folder}: the file name {shown(repr(name))} is refused: it must name a file in this folder")
    path = folder / name
    home, real = folder.resolve(), path.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in homes):
        raise error(f"{path}: refused: it is a link to {real}, which is outside of the folder; copy the file instead")
    return path


def shown(text: object) -> str:
    """A foreign text as it may stand in a message: short, and in printable characters."""
    text = str(text)
    return printable(text) if len(text) <= _SHOWN else f"{printable(text[:_SHOWN])} [...]"


def printable(text: str) -> str:
    """A foreign text without characters that a terminal obeys or hides."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _items(part: dict[str, Any] | list[Any]) -> Any:
    return part.values() if isinstance(part, dict) else part


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the field '{shown(twice)}' is given twice; keep one")
    return fields


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if len(digits) > 10 * _LONGEST_NUMBER or not math.isfinite(number := float(digits)):
        raise ValueError(f"the number {shown(digits[:40])} is too large")
    return number


# Reads JSON as above; of several fields of one name, other decoders keep the last in silence.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole, parse_float=_finite)
