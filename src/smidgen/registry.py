"""What can be chosen by name: the name, where its class lives, a line about it and its paper.

Listing needs no torch; a class is imported when it is asked for.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from smidgen.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One name of a registry. `target` is ``module:Class``."""

    name: str
    target: str
    summary: str
    paper: str = ""

    def load(self) -> Any:
        """Import and answer the class."""
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


METHODS = _table(
    Entry(
        "lora",
        "smidgen.adapters.methods.lora:Lora",
        "low-rank update B A beside each target weight; merges to zero added latency",
        "https://arxiv.org/abs/2106.09685",
    ),
    Entry("full", "smidgen.adapters.methods.full:Full", "every parameter of the base model is trained"),
    Entry("freeze", "smidgen.adapters.methods.full:Freeze", "the last n layers are trained, the rest stays frozen"),
)

LORA_INITS = _table(
    Entry("default", "smidgen.adapters.init.default:initialise", "A uniform, B zero"),
    Entry("gaussian", "smidgen.adapters.init.gaussian:initialise", "A normal, B zero"),
    Entry("random", "smidgen.adapters.init.random:initialise", "A and B random: not the base model at the start"),
    Entry("orthogonal", "smidgen.adapters.init.orthogonal:initialise", "A and B non-zero with B A = 0"),
    Entry("pissa", "smidgen.adapters.init.pissa:initialise", "principal part", "https://arxiv.org/abs/2404.02948"),
    Entry("olora", "smidgen.adapters.init.olora:initialise", "QR of the weight", "https://arxiv.org/abs/2406.01775"),
)


def lookup(table: dict[str, Entry], name: str, kind: str) -> Entry:
    """Answer the entry called `name`.

    Raises:
        UsageError: there is no such entry; the message lists what there is.
    """
    if name not in table:
        raise UsageError(f"{kind}: no '{name}'{did_you_mean(name, table)} There are: {', '.join(table)}.")
    return table[name]
