"""Weights that lie in a mapped file: giving them memory of their own, and letting go of the pages that were read.

A page that was read stays in memory as long as its file is mapped: a whole model, while its layers in 4 bits take a
quarter of that. Only Linux tells what is mapped; elsewhere nothing is let go of before the end.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

_MAPS = Path("/", "proc", "self", "maps")
_DONT_NEED = 4  # of madvise: the pages are read again from the file if they are asked for


class MappedFiles:
    """What is mapped now from files, as ranges of addresses."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        for line in _MAPS.read_text(encoding="utf-8").splitlines() if sys.platform == "linux" else ():
            addresses, _, _, _, inode, *path = line.split(maxsplit=5)
            if inode != "0" and path and path[0].endswith(".safetensors"):
                first, last = (int(address, 16) for address in addresses.split("-"))
                self._ranges.append((first, last))

    def hold(self, tensor: Tensor) -> bool:
        """Whether the tensor lies in one of the files."""
        return tensor.is_cpu and any(first <= tensor.data_ptr() < last for first, last in self._ranges)

    def let_go(self, tensor: Tensor) -> None:
        """Let go of the pages that hold nothing but this tensor, if it lies in a file."""
        if self.hold(tensor):
            first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
            if length > 0:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONT_NEED)


def own_memory(model: torch.nn.Module) -> None:
    """Copy the weights of a model that lie in mapped files.

    The file's pages would stay in memory beside the copies that joined layers get, and a file that is replaced during
    a run would change the weights or end the process.
    """
    files = MappedFiles()
    for tensor in (*model.parameters(), *model.buffers()):
        if files.hold(tensor) or (tensor.is_cpu and sys.platform != "linux"):
            mapped, tensor.data = tensor.data, tensor.data.clone()
            files.let_go(mapped)
