"""``smidgen verify``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base


def verify(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    base: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Make the proof of a run again, from its files alone."""
    from smidgen.export.verify import verify as check_run
    from smidgen.proofs import lines

    checks = check_run(run, base=base, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for line in lines(checks):
            typer.echo(line)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
