"""``smidgen train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.recipe import load_recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, such as train.epochs=3")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    init_adapter: Annotated[
        Path | None, typer.Option("--init-adapter", help="Train the adapter of this folder further.")
    ] = None,
) -> None:
    """Train what a recipe says, and prove that it worked."""
    checked, notes = load_recipe(recipe, overrides or [])
    for note in notes:
        typer.echo(f"note: {note}")
    from smidgen.evaluation.report import write_report
    from smidgen.training.run import train as carry_out

    proof = carry_out(checked, resume=resume, overwrite=overwrite, init_adapter=init_adapter, say=typer.echo)
    typer.echo(f"report: {write_report(Path(checked.output))}")
    if not proof.passed:
        raise typer.Exit(1)
