"""``smidgen merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base, Force
from smidgen.errors import UsageError


def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the model to.")],
    dtype: Annotated[
        str, typer.Option(help="What the weights are cast to: bfloat16, float16 or float32.")
    ] = "bfloat16",
    base: Base = None,
    force: Force = False,
) -> None:
    """Merge an adapter into its base, proven to answer the same."""
    from smidgen.export.merge import BOUNDS, merge_to_folder
    from smidgen.models.open import find, open_model

    dtypes = {str(known).removeprefix("torch."): known for known in BOUNDS}
    if dtype not in dtypes:
        raise UsageError(f"--dtype: '{dtype}' is none of {', '.join(dtypes)}")
    place = find(run, base)
    if place.adapter is None:
        raise UsageError(f"{run}: there is no adapter in it to merge")
    model, tokenizer = open_model(place, "float32", force=force, say=typer.echo)
    merge_to_folder(model, tokenizer, output, dtypes[dtype], say=typer.echo)
    typer.echo(f"merged model: {output}")
