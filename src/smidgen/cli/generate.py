"""``smidgen generate``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from smidgen.cli.options import Base, Force, adapter_switch
from smidgen.errors import UsageError


def generate(
    run: Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a model.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: one a line from standard input.")] = None,
    adapter: Annotated[str, typer.Option(help="on, or off for the base's answers.")] = "on",
    system: Annotated[str | None, typer.Option(help="The system message; default: the run's.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 42,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at once.")] = 16,
    base: Base = None,
    force: Force = False,
) -> None:
    """Answer prompts, or classify them, in the order they came."""
    off = adapter_switch(adapter)
    asked = prompts or [line.rstrip("\n") for line in sys.stdin]
    if not any(text.strip() for text in asked):
        raise UsageError("no prompt was given: name one, or pipe one a line")

    import torch

    from smidgen.data import encode_prompt, encode_text
    from smidgen.models.generate import generate_batch
    from smidgen.models.open import find, open_model

    place = find(run, base)
    model, tokenizer = open_model(place, force=force, say=lambda line: typer.echo(line, err=True))
    if place.task != "causal_lm":
        if off:
            raise UsageError(f"--adapter off: the base alone was not trained for {place.task}; leave it out")
        from smidgen.evaluation.tasks import told

        for line in told(model, tokenizer, asked, place.task):
            typer.echo(line)
        return
    system = system if system is not None else place.recipe.data.system if place.recipe else None

    def encode(text: str) -> list[int]:
        start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if raw:
            return encode_text(text, tokenizer)
        return encode_prompt([*start, {"role": "user", "content": text}], tokenizer)

    torch.manual_seed(seed)
    with model.disable_adapter() if off and place.adapter else nullcontext():
        answers = generate_batch(
            model,
            tokenizer,
            [encode(text) for text in asked],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            top_p=top_p,
        )
    for answer in answers:
        typer.echo(tokenizer.decode(answer, skip_special_tokens=True))
