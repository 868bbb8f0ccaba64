"""``smidgen methods``."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from smidgen.registry import METHODS


def methods() -> None:
    """List the methods that a recipe's `adapter.method` can name."""
    table = Table("method", "what it trains", "paper", box=None, pad_edge=False)
    for entry in METHODS.values():
        table.add_row(entry.name, entry.summary, entry.paper)
    Console().print(table)
