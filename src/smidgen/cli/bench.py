"""``smidgen bench``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated, Any

import typer

from smidgen import threads
from smidgen.errors import UsageError


def bench(
    model: Annotated[
        str | None, typer.Option(help="A model, as recipes name it; without one a small random Llama.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each row.")] = 256,
    dropout: Annotated[float, typer.Option(min=0.0, max=0.9, help="LoRA's dropout.")] = 0.05,
    repeat: Annotated[int, typer.Option(min=1, help="Steps of each variant; medians are told.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measure a training step here, with the kernels and without."""
    import torch

    from smidgen.models.load import best_device, choose_dtype, load_model
    from smidgen.models.random import random_llama
    from smidgen.models.resolve import resolve_model
    from smidgen.training.step import RANK, Task, available, compare, make_step, table

    told: list[str] = []
    say = told.append if as_json else typer.echo
    device = best_device()
    dtype, reason = choose_dtype("auto", device)
    task = Task(rows, length, dropout)
    folder = resolve_model(model, say=say) if model else None
    say(f"device: {device}; dtype: {str(dtype).removeprefix('torch.')} ({reason})")
    if device.type == "cpu":
        say(threads.told(torch.get_num_threads()))
    variants = available(device)
    with ExitStack() as stack:
        steps, base = {}, None
        for variant in variants:
            base = load_model(folder, device=device, say=_silent)[0] if folder else random_llama(dtype).to(device)
            if length > base.config.max_position_embeddings:
                raise UsageError(
                    f"--length: {length} tokens, but the model takes {base.config.max_position_embeddings}"
                )
            steps[variant] = make_step(variant, base, task, stack, say)
        assert base is not None
        if "smidgen" not in variants:
            say(_why_plain(device))
        parameters = sum(parameter.numel() for parameter in base.parameters() if not parameter.requires_grad)
        attention = base.config._attn_implementation
        name = model or f"random {base.config.model_type}, {base.config.num_hidden_layers} layers"
        say(f"model: {name}, {parameters / 1e6:.1f} million parameters, attention {attention}")
        say(f"step: {rows} x {length} tokens, LoRA r {RANK} on all linear layers, dropout {dropout:g}, AdamW")
        results, speed = compare(steps, base, task, repeat)
    say(f"limit: a product of {speed / 1e9:,.0f} GFLOP/s; each weight and token takes 4 FLOP")
    if not as_json:
        for line in table(results):
            typer.echo(line)
        return
    document: dict[str, Any] = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "waiting": threads.waiting(),
        "attention": attention,
        "model": name,
        "parameters": parameters,
        **asdict(task),
        "repeat": repeat,
        "product_flops": speed,
        "variants": {variant: asdict(found) for variant, found in results.items()},
        "told": told,
    }
    typer.echo(json.dumps(document, indent=2))


def _silent(line: str) -> None:
    """What was told once already."""


def _why_plain(device: Any) -> str:
    from smidgen import kernels

    return kernels.chosen() if device.type == "cpu" else f"kernels: none on {device.type}; PyTorch's own run there"
