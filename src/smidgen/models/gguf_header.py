"""The header of a GGUF file, checked before the reader library believes it: counts, lengths, types and offsets.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

import gguf

from smidgen.errors import ModelError

_MOST_FIELDS = 10_000
_MOST_TENSORS = 100_000
_MOST_ITEMS = 2_000_000  # of an array: tokens, merges
_LONGEST_TEXT = 16 * 2**20  # bytes
_LARGEST_HEADER = 256 * 2**20
_STRING, _ARRAY = int(gguf.GGUFValueType.STRING), int(gguf.GGUFValueType.ARRAY)
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes, by the number of the type


def check_header(path: Path) -> None:
    """Walk through the header of a little-endian GGUF file.

    Raises:
        ModelError: it is cut off, or claims what the file does not hold.
    """
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).header()
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from None


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def header(self) -> None:
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("<I")) not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are read")
        tensors, fields = self.count(_MOST_TENSORS, "tensors"), self.count(_MOST_FIELDS, "fields")
        alignment = 32
        for _ in range(fields):
            name = self.text()
            kind = self.number("<I")
            if name == b"general.alignment" and kind == int(gguf.GGUFValueType.UINT32):
                alignment = self.number("<I")
            else:
                self.value(kind)
        if not 1 <= alignment <= 2**16:
            raise ValueError(f"the alignment is {alignment}")
        places = [self.tensor() for _ in range(tensors)]
        start = -(-self.file.tell() // alignment) * alignment
        for name, offset, length in places:
            if start + offset + length > self.size:
                raise ValueError(f"the tensor {name} ends at byte {start + offset + length:,} of {self.size:,}")

    def tensor(self) -> tuple[str, int, int]:
        """Name, offset and length in bytes of one tensor."""
        name = repr(self.text()[:100].decode(errors="replace"))
        if (dimensions := self.number("<I")) > 4:
            raise ValueError(f"the tensor {name} has {dimensions:,} dimensions")
        shape = [self.number("<Q") for _ in range(dimensions)]
        kind = self.number("<I")
        if kind not in gguf.GGMLQuantizationType._value2member_map_:
            raise ValueError(f"the tensor {name} is of the unknown type {kind}")
        block, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        numbers = math.prod(shape)
        if not 0 < numbers < 2**48 or numbers % block:
            raise ValueError(f"the tensor {name} has the shape {shape}")
        return name, self.number("<Q"), numbers // block * width

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.text()
        elif kind == _ARRAY:
            inner = self.number("<I")
            items = self.count(_MOST_ITEMS, "items of an array")
            if inner == _STRING:
                for _ in range(items):
                    self.text()
            else:
                self.skip(items * self.width(inner))
        else:
            self.skip(self.width(kind))

    def width(self, kind: int) -> int:
        if kind not in _WIDTHS:
            raise ValueError(f"a value is of the unknown type {kind}")
        return _WIDTHS[kind]

    def count(self, most: int, what: str) -> int:
        if (number := self.number("<Q")) > most:
            raise ValueError(f"{number:,} {what}, more than {most:,}")
        return number

    def number(self, form: str) -> int:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def text(self) -> bytes:
        length = self.count(_LONGEST_TEXT, "bytes of a text")
        text = self.file.read(length)
        if len(text) < length:
            raise ValueError("the file is cut off")
        self.skip(0)
        return text

    def skip(self, bytes: int) -> None:
        if self.file.seek(bytes, 1) > min(self.size, _LARGEST_HEADER):
            raise ValueError("the file is cut off, or its header is larger than such headers are")
