"""Starts of LoRA that need more than the weight: data, or the weight that a stored one was made from."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.init import Start
from smidgen.adapters.init.config import MEASURED, StartConfig
from smidgen.adapters.layers import is_linear, layer_of
from smidgen.adapters.targets import find_targets, pattern_value
from smidgen.errors import UsageError
from smidgen.registry import LORA_INITS


@torch.no_grad()
def initialise_from(
    model: nn.Module,
    config: Any,
    batches: Iterable[Mapping[str, Any]] | None = None,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Compute how LoRA starts where that takes more than the weights of the base; call it before attaching.

    The start of each layer is written into `config.starts`; EVA also writes the ranks that it gives.

    Args:
        model: the base.
        config: a `LoraConfig` whose `init_lora_weights` is "eva", "corda", "lora_ga" or "loftq".
        batches: for the first three: keyword arguments of calls of the model; for "lora_ga" with labels. They are kept
            while this takes.
        weights: for "loftq": the folder with the safetensors files of the base in 16 bits, or its tensors by name.
        say: gets a line about what was computed, and how long it took.

    Raises:
        UsageError: the start needs none of this, its source is missing or does not do, or a rank is too large.
    """
    if not (isinstance(config, StartConfig) and config.is_measured):
        raise UsageError(f"init_lora_weights: needs no data or weights; {', '.join(MEASURED)} do")
    name, begin = config.init_name(), time.perf_counter()
    given = list(batches or ())
    wanted, source = ("weights", weights) if name == "loftq" else ("batches", given)
    if not source:
        raise UsageError(f"init_lora_weights: '{name}' is computed from {wanted}, and there are none")
    initialise = LORA_INITS[name].load()
    training = model.training
    model.eval()
    try:
        measured = sys.modules[initialise.__module__].measure(model, config, _linear(model, config), source)
        starts = {}
        for path in (paths := _linear(model, config)):
            found = measured(path)
            if found is not None:
                starts[path] = _start(model, path, config, initialise, found)
    finally:
        model.train(training)
    config.starts = starts
    ranks = sorted({len(a) for a, _, _ in starts.values()})
    spread = f", ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
    of = f" from {len(given)} batches" if wanted == "batches" else ""
    seconds = time.perf_counter() - begin
    say(f"start: {name}{of} for {len(starts)} of {len(paths)} linear layers{spread}; {seconds:.1f} s")


def _linear(model: nn.Module, config: Any) -> list[str]:
    return [path for path in find_targets(model, config) if is_linear(model.get_submodule(path))]


def _start(
    model: nn.Module, path: str, config: Any, initialise: Callable[..., Any], measured: Any
) -> tuple[Tensor, Tensor, bool]:
    module: Any = model.get_submodule(path)
    layer = layer_of(module)
    assert layer is not None
    r = pattern_value(config.rank_pattern, path, config.r)
    scaling = config.scaling(r, pattern_value(config.alpha_pattern, path, config.lora_alpha))
    options = getattr(config, f"{config.init_name()}_config")
    start = Start(layer.shape, layer.device, lambda: layer.matrix(module.weight.detach()).float(), measured, options)
    a, b, offset = initialise(start, r, scaling)
    if len(a) != r or b.shape[1] != r:
        raise UsageError(f"{path}: r: {r} asks for more directions than a weight {layer.shape} has for this start")
    return a.contiguous(), b.contiguous(), offset
