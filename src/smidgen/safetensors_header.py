"""The header of a safetensors file, checked in full before anything of the file is mapped or allocated.

A file is 8 bytes of header length (little endian), a JSON header, and the tensors' bytes. The header names each
tensor's dtype, shape and place. Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from smidgen.foreign import parse_json, shown

LARGEST_HEADER = 16 * 2**20  # bytes
_MOST_TENSORS = 200_000
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


@dataclass(frozen=True)
class Tensor:
    """What a header says about one tensor. `bytes`: how many it takes in the file."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path, error: type[Exception]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Answer the tensors of a safetensors file by name, and the file's metadata.

    Raises:
        error: the file is not a safetensors file, or its header does not describe the bytes that follow it.
    """

    def wrong(problem: str) -> Exception:
        return error(f"{path}: not a readable safetensors file: {problem}")

    if not os.path.isfile(path):
        raise error(f"{path}: {'is not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise wrong(f"the header would be {length:,} bytes long, the file has {size:,}; it may be cut off")
            if length > LARGEST_HEADER:
                raise wrong(f"the header is {length:,} bytes long, more than {LARGEST_HEADER:,}")
            text = file.read(length)
    except OSError as problem:
        raise wrong(str(problem.strerror)) from None
    if text[:1] != b"{":
        raise wrong("the header is not a JSON object" + (", but a pickle" if text[:1] == b"\x80" else ""))
    header = parse_json(text, f"{path}: not a readable safetensors file: header", error)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise wrong("__metadata__ must be texts by name")
    if len(header) > _MOST_TENSORS:
        raise wrong(f"{len(header):,} tensors, more than {_MOST_TENSORS:,}")
    tensors: dict[str, Tensor] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        here = f"tensor '{shown(name)}'"
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, place = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise wrong(f"{here}: unknown dtype {shown(repr(dtype))}")
        if not _counts(shape) or len(shape) > 16:
            raise wrong(f"{here}: the shape must be a list of counts, got {shown(shape)}")
        if not _counts(place) or len(place) != 2:
            raise wrong(f"{here}: data_offsets must be two counts, got {shown(place)}")
        begin, end = place
        needed = math.prod(shape) * _BITS[dtype]
        if needed != 8 * (end - begin):
            raise wrong(f"{here}: {dtype} of shape {shown(shape)} does not fill the bytes {begin:,} to {end:,}")
        tensors[name] = Tensor(dtype, tuple(shape), end - begin)
        places.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            raise wrong(f"tensor '{shown(name)}' begins at byte {begin:,}, the one before it ends at {reached:,}")
        reached = end
    if 8 + length + reached != size:
        raise wrong(
            f"the tensors end at byte {8 + length + reached:,}, the file at {size:,}; it is cut off or holds more"
        )
    return tensors, metadata


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
