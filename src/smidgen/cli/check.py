"""``smidgen check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.errors import UsageError
from smidgen.recipe import load_recipe


def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, such as train.epochs=3")] = None,
    init_adapter: Annotated[
        Path | None, typer.Option("--init-adapter", help="The adapter that would be trained further.")
    ] = None,
) -> None:
    """Show what a recipe would train and need, and train nothing."""
    checked, notes = load_recipe(recipe, overrides or [])
    for note in notes:
        typer.echo(f"note: {note}")
    from smidgen.models.fuse import fused
    from smidgen.training.setup import make_trainable, plan, prepare

    setup = prepare(checked, init_adapter, typer.echo)
    make_trainable(setup, typer.echo)
    with fused(setup.model, typer.echo):
        forecast = plan(setup, typer.echo)
    if not forecast.fits:
        raise UsageError("the run does not fit into memory")
