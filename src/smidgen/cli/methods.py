"""``smidgen methods``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def methods(
    model: Annotated[str | None, typer.Argument(help="Count what each would train in this model.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table in Markdown.")] = False,
) -> None:
    """List the methods that a recipe's `adapter.method` can name."""
    from smidgen.models import overview
    from smidgen.models.resolve import resolve_model
    from smidgen.models.shapes import describe_model

    def say(line: str) -> None:
        typer.echo(line, err=True)

    config = describe_model(resolve_model(model, weights=False, say=say)).config if model else None
    lines = overview.overview(config)
    if markdown:
        typer.echo(overview.markdown(lines))
    else:
        words = [[line.entry.name, line.entry.summary, line.entry.paper] for line in lines]
        _print(["method", "what is trained", "paper"], words)
        given = 0 if model else 2  # columns that only a model fills
        facts = [[line.entry.name, *line.cells()[given:]] for line in lines]
        _print(["method", *overview.HEADER[given:]], facts)
    for line in lines:
        if line.refused:
            say(f"{line.entry.name}: {line.refused}")


def _print(header: list[str], rows: list[list[str]]) -> None:
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table, "")
