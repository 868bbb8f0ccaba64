"""Memory while a run goes on: how much it took, and what is told when there is none left."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

import psutil
import torch

from smidgen.errors import TrainingStopped

_PAUSE = 0.01  # seconds between two looks at the process
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of GNU's mallopt, see malloc.h


def held(device: torch.device) -> int:
    """Bytes that this process holds on the device; on a CPU all of the process, its libraries too."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Return memory that earlier runs of this process have freed to the system.

    GNU's allocator keeps freed pieces, and what many runs leave behind adds up; others return them by themselves.
    """
    gc.collect()
    if library := _gnu():
        library.malloc_trim(0)


def keep_freed(keep: bool) -> None:
    """Whether memory that is freed from now on stays with the process; otherwise as GNU's allocator does by itself.

    It would return the activations of each step and fetch them again, a page at a time: 105,000 page faults a step of
    a model of 135M parameters, a twentieth of the time.
    """
    if library := _gnu():
        library.mallopt(_MMAP_THRESHOLD, 2**25)  # what it comes to by itself, and the most that is allowed
        library.mallopt(_TRIM_THRESHOLD, 2**30 if keep else 2**26)


def _gnu() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "malloc_trim") else None


class PeakMemory:
    """Inside the block, `peak` becomes the most bytes held on a device.

    CUDA counts by itself; elsewhere a thread looks a hundred times a second.
    """

    def __init__(self, device: torch.device):
        self._device, self._done = device, threading.Event()
        self._thread = None if device.type == "cuda" else threading.Thread(target=self._watch, daemon=True)
        self.peak = held(device)

    def __enter__(self) -> Self:
        if self._thread is None:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is None:
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_PAUSE):
            self.peak = max(self.peak, held(self._device))


@contextmanager
def telling_out_of_memory(where: Callable[[], str], advice: Callable[[], str]) -> Iterator[None]:
    """Where memory ends inside the block, say where that was and what to do.

    Raises:
        TrainingStopped: in place of what torch or Python raise then, which differs by device.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        told = str(error).lower()
        words = ("can't allocate memory", "not enough memory", "out of memory")
        onednn = "could not create a primitive" in told and "descriptor" not in told  # a descriptor: it cannot at all
        if isinstance(error, RuntimeError) and not onednn and not any(word in told for word in words):
            raise
        raise TrainingStopped(f"out of memory {where()}.\n{advice()}") from error
