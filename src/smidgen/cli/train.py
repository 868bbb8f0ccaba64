"""``smidgen train``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from smidgen.recipe import load_recipe
from smidgen.training.launch import launch, one_voice, rank


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, such as train.epochs=3")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in the folder.")] = False,
    init_adapter: Annotated[
        Path | None, typer.Option("--init-adapter", help="Train the adapter of this folder, or of this run, further.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="How many processes share the training; on GPUs one for each.")
    ] = 1,
) -> None:
    """Train what a recipe says, and prove that it worked."""
    with one_voice():
        checked, notes = load_recipe(recipe, overrides or [])
        if processes > 1:
            options = [text for text, given in (("--resume", resume), ("--overwrite", overwrite)) if given]
            options += [f"--init-adapter={init_adapter}"] if init_adapter else []
            options += ["--debug"] if "--debug" in sys.argv else []
            command = [sys.executable, "-m", "smidgen", "train", *options, "--", str(recipe), *(overrides or [])]
            raise typer.Exit(launch(processes, command, typer.echo))
        for note in notes if rank() == 0 else []:
            typer.echo(f"note: {note}")
        gc.disable()  # importing makes a million objects and no garbage; looking for it takes half a second
        from smidgen.training.run import train as carry_out
        from smidgen.training.start import Start

        gc.freeze()
        gc.enable()
        start = Start(of_process=True)
        proof = carry_out(
            checked, resume=resume, overwrite=overwrite, init_adapter=init_adapter, say=typer.echo, start=start
        )
        if rank() == 0:
            from smidgen.evaluation.report import write_report

            typer.echo(f"report: {write_report(Path(checked.output))}")
    if not proof.passed:
        raise typer.Exit(1)
