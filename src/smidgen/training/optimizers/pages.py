"""States in a file that is mapped into memory: the system writes its pages out and reads them back as it needs to."""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from smidgen.training.optimizers.states import PAGED, Layout

_ALIGNED = 64  # bytes: a cache line, so that a part is computed as it would be by itself


class Pages:
    """Zeros for all states of a layout but the step, in a temporary file of `folder`.

    The file has no name (on Windows it goes with its last handle): nothing stays behind, not even after a crash.
    Its blocks are taken at once, where the system can do so: a disk that fills up later cannot end the process.

    Raises:
        OSError: there is no room for the file.
    """

    def __init__(self, folder: Path, layout: Layout):
        places, end = {}, 0
        for name, states in layout.items():
            for what, state in states.items():
                if state.ndim:
                    places[name, what] = (state, end)
                    end += -(-state.nbytes // _ALIGNED) * _ALIGNED
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, end)
            else:
                file.truncate(end)
            self._map = mmap.mmap(file.fileno(), end)
        self._used = 0  # bytes since pages were let go of
        self._states = {
            place: torch.frombuffer(self._map, dtype=state.dtype, count=state.numel(), offset=start).view(state.shape)
            for place, (state, start) in places.items()
        }

    def __getitem__(self, place: tuple[str, str]) -> Tensor:
        """A state by parameter and name."""
        return self._states[place]

    def used(self, size: int) -> None:
        """Count bytes that were worked on; once they are many, let go of them. Each time costs some microseconds."""
        self._used += size
        if self._used >= PAGED:
            self.release()

    def release(self) -> None:
        """Let go of the memory of all pages; what they hold is kept, in the system's cache or in the file."""
        self._used = 0
        if hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
