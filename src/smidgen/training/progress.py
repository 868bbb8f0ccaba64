"""What a run says while it runs: a line for every logged step, and a live line below it in a terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

import psutil
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """Shows how far a run is. Used as a context.

    Args:
        total: updates of the whole run.
        done: updates that an earlier part of the run has made.
        device: whose memory is shown.
        quiet: show nothing, as every process but the first does.
    """

    def __init__(self, total: int, done: int, device: torch.device, quiet: bool = False):
        self._total, self._first, self._device = total, done, device
        self._console = Console(soft_wrap=True, highlight=False, quiet=quiet)
        self._live = (
            Live(console=self._console, transient=True, auto_refresh=False) if self._console.is_terminal else None
        )
        self._begun = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False)

    def step(self, done: int, tokens_per_second: float) -> None:
        """Show the state after `done` updates, in a terminal only."""
        if self._live:
            width = 24
            filled = width * done // self._total
            bar = "━" * filled + "╌" * (width - filled)
            self._live.update(Text(f"{bar} {self.state(done, tokens_per_second)}"), refresh=True)

    def state(self, done: int, tokens_per_second: float) -> str:
        """``step 40/125  331 tokens/s  1.84 GB  left 0:04:10``."""
        seconds = (time.monotonic() - self._begun) / max(1, done - self._first) * (self._total - done)
        left = str(timedelta(seconds=round(seconds)))
        memory = memory_used(self._device) / 1e9
        return f"step {done}/{self._total}  {tokens_per_second:.0f} tokens/s  {memory:.2f} GB  left {left}"


def memory_used(device: torch.device) -> int:
    """Bytes that the run holds now: of the process on a CPU, of the allocator elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return psutil.Process().memory_info().rss
