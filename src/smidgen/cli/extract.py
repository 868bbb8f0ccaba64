"""``smidgen extract``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smidgen.cli.options import Rank


def extract(
    base: Annotated[str, typer.Argument(help="The model that was tuned, as recipes name it.")],
    tuned: Annotated[str, typer.Argument(help="What it became: a whole model of the same shape.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the LoRA adapter to.")],
    rank: Rank = 16,
) -> None:
    """Extract a LoRA adapter from the difference of two models."""
    from smidgen.models.extract import extract_lora
    from smidgen.models.load import load_tokenizer
    from smidgen.models.resolve import resolve_model

    folder = resolve_model(tuned)
    tokenizer = load_tokenizer(folder)
    extract_lora(resolve_model(base), folder, output, rank, typer.echo)
    tokenizer.save_pretrained(output)
    typer.echo(f"LoRA adapter: {output}")
