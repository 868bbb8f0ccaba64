"""``smidgen score``."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base
from smidgen.recipe import Source


def score(
    run: Annotated[Path, typer.Argument(help="A run folder, an adapter folder, or a merged reward model.")],
    data: Annotated[str, typer.Argument(help="A file of pairs, of answers, or of solutions in steps.")],
    output: Annotated[Path | None, typer.Option(help="Where the lines go; default: standard output.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each file.")] = None,
    base: Base = None,
) -> None:
    """Score answers with a reward model: a JSON line for each row.

    The summary goes to standard error.
    """
    from smidgen.evaluation.rewards import Scored, load_scorer, score_files

    def say(line: str) -> None:
        typer.echo(line, err=True)

    scorer, found = load_scorer(run, base=base, say=say), Scored()
    with output.open("w", encoding="utf-8") if output else nullcontext() as file:
        for line in score_files(scorer, [Source(data)], found, limit, say):
            typer.echo(json.dumps(line), file=file)
    for line in found.lines():
        say(line)
