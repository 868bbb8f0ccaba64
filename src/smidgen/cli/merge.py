"""``smidgen merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from smidgen.cli.options import Base, Force
from smidgen.errors import UsageError


def merge(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the model to.")],
    dtype: Annotated[
        str, typer.Option(help="What the weights are cast to: bfloat16, float16 or float32.")
    ] = "bfloat16",
    quantize: Annotated[
        str | None, typer.Option(help="Store the merged weights again: nf4, fp4 or int8; what that changes is told.")
    ] = None,
    base: Base = None,
    force: Force = False,
) -> Any:
    """Merge an adapter into its base, proven to answer the same."""
    from smidgen.export.merge import BOUNDS, merge_to_folder
    from smidgen.models.open import find, open_model
    from smidgen.quant import KINDS

    dtypes = {str(known).removeprefix("torch."): known for known in BOUNDS}
    if dtype not in dtypes:
        raise UsageError(f"--dtype: '{dtype}' is none of {', '.join(dtypes)}")
    if quantize not in (None, *KINDS):
        raise UsageError(f"--quantize: '{quantize}' is none of {', '.join(KINDS)}")
    place = find(run, base)
    if place.adapter is None:
        raise UsageError(f"{run}: there is no adapter in it to merge")
    model, tokenizer = open_model(place, "float32", force=force, say=typer.echo)
    parity = merge_to_folder(model, tokenizer, output, dtypes[dtype], typer.echo, quantize, place)
    typer.echo(f"merged model: {output}")
    return parity
