"""``smidgen plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from smidgen.errors import UsageError
from smidgen.recipe import load_recipe


def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, such as train.epochs=3")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, or a card such as 'RTX 4090'; by default this machine's best.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="A GPU of this size instead, such as 24GB or 24GiB.")] = None,
) -> None:
    """Forecast memory and time, from the model's config alone."""
    checked, notes = load_recipe(recipe, overrides or [])
    for note in notes:
        typer.echo(f"note: {note}")
    if checked.model_task != "causal_lm":
        raise UsageError(f"plan knows language models; for 'task: {checked.task}' take: smidgen check {recipe}")
    from smidgen.training import run  # noqa: F401  (what a training imports counts among its libraries)
    from smidgen.training.plan import PARTS, duration, size_text
    from smidgen.training.ways import outlook_of, told

    found = outlook_of(checked, device, memory, typer.echo)
    where, rows = found.outlook.device, found.outlook.rows
    typer.echo(f"device: {where.name}, {size_text(where.memory)}; dtype: {str(where.dtype).removeprefix('torch.')}")
    read = f"{rows.count:,} rows of {rows.mean:.0f} tokens, " if rows.count else ""
    typer.echo(f"data: {read}the longest {rows.longest:,}")
    table = Table("", *(way.title + " *" * way.asked for way, _, _ in found.found), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    forecasts = [forecast for _, forecast, _ in found.found]
    for part in PARTS:
        table.add_row(part, *(size_text(forecast.bytes()[part]) for forecast in forecasts))
    table.add_row("peak", *(size_text(forecast.peak) for forecast in forecasts))
    table.add_row("tokens at once", *(f"{forecast.micro_batch_tokens:,}" for forecast in forecasts))
    table.add_row("1,000 tokens", *(f"{1000 * f.rate:.1f} s" if f.rate else "not known" for f in forecasts))
    if rows.count:
        table.add_row("the run", *(duration(forecast.seconds) for forecast in forecasts))
    Console().print(table)
    typer.echo("* the recipe's own")
    for way, forecast, remedy in found.found:
        typer.echo(told(way, forecast, remedy, found.outlook))
