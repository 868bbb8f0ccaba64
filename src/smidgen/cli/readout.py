"""``smidgen readout``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base, Force
from smidgen.errors import UsageError


def readout(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    count: Annotated[int, typer.Option(min=1, help="Tokens shown for each soft token.")] = 5,
    base: Base = None,
    force: Force = False,
) -> None:
    """Show the tokens nearest to each soft token of a prompt."""
    from smidgen.foreign import printable
    from smidgen.models.open import find, open_model
    from smidgen.models.readout import nearest_tokens

    place = find(run, base)
    if place.adapter is None:
        raise UsageError(f"{run}: holds no adapter")
    model, tokenizer = open_model(place, force=force, say=lambda line: typer.echo(line, err=True))
    for number, tokens in enumerate(nearest_tokens(model, count)):
        shown = (f"{printable(repr(tokenizer.decode([token])))} {cosine:.2f}" for token, cosine in tokens)
        typer.echo(f"{number:>4}  {'  '.join(shown)}")
