"""``smidgen flow``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.errors import UsageError
from smidgen.flow import kind_of, load_flow, target_of
from smidgen.training.launch import world


def flow(
    file: Annotated[Path, typer.Argument(help="The flow, a YAML file.")],
    check: Annotated[bool, typer.Option("--check", help="Check it and show its stages; run nothing.")] = False,
) -> None:
    """Run the stages of a file, and go on where it stopped."""
    if world() > 1:
        raise UsageError("flow: runs in one process; start it without a launcher")
    checked = load_flow(file)
    if check:
        for name, stage in checked.stages.items():
            typer.echo(f"{name}: {kind_of(stage)} {target_of(stage) or ''}".rstrip())
        return
    from smidgen.cli.stages import run_flow

    run_flow(checked, typer.echo)
    typer.echo(f"flow: all of {len(checked.stages)} stages done, in {checked.output}")
