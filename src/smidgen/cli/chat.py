"""``smidgen chat``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated, Any

import typer

from smidgen.cli.options import Base, Force, adapter_switch
from smidgen.errors import UsageError

HELP = "/off and /on: a new talk without or with the adapter; /new: a new talk; /quit or Ctrl-D: leave"


def chat(
    run: Annotated[str, typer.Argument(help="A run folder, an adapter folder, or a model.")],
    adapter: Annotated[str, typer.Option(help="on, or off to talk to the base.")] = "on",
    system: Annotated[str | None, typer.Option(help="The system message; default: the run's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    base: Base = None,
    force: Force = False,
) -> None:
    """Talk to a tuned model; answers appear as they are generated."""
    from smidgen.data import encode_prompt
    from smidgen.models.generate import stream
    from smidgen.models.open import find, open_model

    off = adapter_switch(adapter)
    place = find(run, base)
    if place.task != "causal_lm":
        raise UsageError(f"a model for {place.task} does not talk; ask it with: smidgen generate {run} TEXT")
    model, tokenizer = open_model(place, force=force, say=typer.echo)
    system = system if system is not None else place.recipe.data.system if place.recipe else None
    start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    talk = list(start)
    shown = sys.stdin.isatty()
    if shown:
        typer.echo(HELP)
    while True:
        try:
            said = input("you: " if shown else "").strip()
        except EOFError:
            return
        if said in ("/quit", "/exit"):
            return
        if said in ("/on", "/off", "/new"):
            # A new talk each time: a base that has read the adapter's answers imitates them.
            off, talk = (off if said == "/new" else said == "/off"), list(start)
            typer.echo(f"a new talk, adapter {'off' if off else 'on'}")
            continue
        if not said:
            continue
        talk.append({"role": "user", "content": said})
        sampling = {"do_sample": temperature > 0, "temperature": temperature or 1.0, "top_p": top_p}
        answer = ""
        with model.disable_adapter() if off and place.adapter else nullcontext():
            for piece in stream(
                model, tokenizer, encode_prompt(talk, tokenizer), max_new_tokens=max_new_tokens, **sampling
            ):
                answer += piece
                typer.echo(piece, nl=False)
        typer.echo()
        talk.append({"role": "assistant", "content": answer})
