"""What a proof is made of: claims with their numbers. Training makes them, `smidgen verify` makes them again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# The file of a run folder that holds what a fresh process has to find again.
RECORD_NAME = "record.json"


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
