"""``smidgen evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base, Force
from smidgen.errors import UsageError
from smidgen.recipe import Source


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    data: Annotated[str | None, typer.Option(help="Held-out rows; default: the evaluation file of the run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each file.")] = None,
    few_shot: Annotated[int, typer.Option(min=0, help="Solved examples that the base is shown in a second try.")] = 0,
    few_shot_data: Annotated[str | None, typer.Option(help="Their file; default: the run's training file.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows generated at once.")] = 64,
    base: Base = None,
    force: Force = False,
) -> None:
    """Compare the exact matches of base and tuned on held-out rows."""
    from smidgen.evaluation.compare import choose_few_shot, compare, read_examples
    from smidgen.models.open import find, open_model

    place = find(run, base)
    if place.adapter is None:
        raise UsageError(f"{run}: holds no adapter, so there is no base to compare with")
    recipe = place.recipe
    source = _source(data, recipe.data.eval if recipe else None, "--data")
    shots = []
    if few_shot:
        shots_source = _source(few_shot_data, recipe.data.train if recipe else None, "--few-shot-data")
        shots = choose_few_shot(shots_source, few_shot, seed=recipe.seed if recipe else 0)
    model, tokenizer = open_model(place, force=force)
    found = compare(
        model,
        tokenizer,
        read_examples(source, limit),
        few_shot=shots,
        system=recipe.data.system if recipe else None,
        batch_size=batch_size,
        progress=typer.echo,
    )
    for line in found.lines():
        typer.echo(line)
    typer.echo(f"chat with it: smidgen chat {run}")


def _source(given: str | None, recipe: list[Source] | None, option: str) -> Source:
    if given:
        return Source(given)
    if not recipe:
        raise UsageError(f"{option} FILE is needed: the run names no such file")
    return recipe[0]
