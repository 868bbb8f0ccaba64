"""How long a run takes until its first update is made, and what that time goes to."""

from __future__ import annotations

import time

import psutil


class Start:
    """Adds up seconds under names, one stretch after the other.

    Args:
        of_process: count from the start of this process, as a command does; else from now.
    """

    def __init__(self, of_process: bool = False):
        self._last = psutil.Process().create_time() if of_process else time.time()
        self.seconds: dict[str, float] = {}

    def spent(self, name: str) -> None:
        """What has passed since the last call was spent on this."""
        now = time.time()
        self.seconds[name] = self.seconds.get(name, 0.0) + max(0.0, now - self._last)
        self._last = now

    def line(self) -> str:
        """``first step after 6.1 s: imports 2.9, model 0.4, ...``"""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        return f"first step after {sum(self.seconds.values()):.1f} s: {parts}"
