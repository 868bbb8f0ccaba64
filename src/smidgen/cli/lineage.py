"""``smidgen lineage``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from smidgen.models.lineage import Node


def lineage(
    run: Annotated[Path, typer.Argument(help="A run folder, an adapter folder of one, or a merged model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the tree as JSON.")] = False,
) -> None:
    """Draw what a run came from, and check that it is still so."""
    from smidgen.models.lineage import read_lineage

    root = read_lineage(run)
    checks = root.all_checks()
    bad = sum(not check.passed for check in checks)
    if as_json:
        typer.echo(json.dumps(root.to_dict()))
    else:
        for line in draw(root):
            typer.echo(line)
        typer.echo(f"FAIL {bad} of {len(checks)} are not as recorded" if bad else f"ok   {len(checks)} as recorded")
    if bad:
        raise typer.Exit(1)


def draw(node: Node) -> Iterator[str]:
    """The lines of a tree, the youngest at the top."""
    yield f"{node.role} of {node.folder.as_posix()}" * (node.role is not None) or node.folder.as_posix()
    bar = "│  " if node.parents else "   "
    for line in (node.kind, *node.told, *(f"changed: {line}" for line in node.changed)):
        yield bar + line
    for check in node.checks:
        if not check.passed:
            yield f"{bar}FAIL {check.text}"
    for parent in node.parents:
        last = parent is node.parents[-1]
        first, *others = draw(parent)
        yield ("└─ " if last else "├─ ") + first
        yield from (("   " if last else "│  ") + line for line in others)
