"""``smidgen convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Base, Force, Rank
from smidgen.errors import UsageError


def convert(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the adapter to.")],
    rank: Rank = 16,
    to: Annotated[
        str, typer.Option(help="lora; or a format of files: mlx, peft (from mlx), per-expert, stacked (experts).")
    ] = "lora",
    base: Base = None,
    force: Force = False,
) -> None:
    """Convert an adapter to LoRA, or to another format of files."""
    from smidgen.export.convert import convert_files, convert_to_folder
    from smidgen.models.open import find, open_model

    if to != "lora":
        convert_files(run, output, to, base)
        typer.echo(f"{to} adapter: {output}")
        return
    place = find(run, base)
    if place.adapter is None:
        raise UsageError(f"{run}: there is no adapter in it to convert")
    model, tokenizer = open_model(place, "float32", force=force, say=typer.echo)
    convert_to_folder(model, tokenizer, output, rank, typer.echo)
    typer.echo(f"LoRA adapter: {output}")
