"""What a proof is made of: claims with their numbers. Training makes them, `smidgen verify` makes them again."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The file of a run folder that holds what a fresh process has to find again.
RECORD_NAME = "record.json"
Z = 1.96  # two-sided 95 % of a normal distribution


@dataclass(frozen=True)
class Check:
    """One claim: what was measured, told in `text`, and whether it holds."""

    name: str
    passed: bool
    text: str
    numbers: dict[str, Any]


def lines(checks: Iterable[Check]) -> list[str]:
    """One line for each check."""
    return [f"{'ok  ' if check.passed else 'FAIL'} {check.text}" for check in checks]


def wilson(right: int, rows: int) -> tuple[float, float]:
    """Answer the 95 % interval of a share of `right` among `rows`, both ends in 0..1 (Wilson 1927)."""
    share, spread = right / rows, Z**2 / rows
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))
