"""A and B make up for what storing the weight in 4 or 8 bits lost (LoftQ, https://arxiv.org/abs/2310.08659).

The start is then not the stored base, but nearer to what it was stored from. Legend: the weight W is (out, in), Q what
its stored form stands for, R rank, s the scaling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from smidgen.adapters.config import whole_number
from smidgen.adapters.init import Start
from smidgen.errors import UsageError, raise_all
from smidgen.quant import quantize
from smidgen.quant.linear import QuantizedLinear


@dataclass(kw_only=True)
class LoftQConfig:
    """What is particular to LoftQ.

    Args:
        loftq_bits: 4 or 8, as the base is stored.
        loftq_iter: with 1 the base stays as it is. More: what is left of the weight without s B A is stored anew, in
            place, and A and B are found again. The base has to be saved with the adapter then.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        problems = [] if self.loftq_bits in (4, 8) else [f"loftq_config.loftq_bits: 4 or 8, got {self.loftq_bits}"]
        raise_all(UsageError, problems + whole_number("loftq_config.loftq_iter", self.loftq_iter, most=100))


class Stored(NamedTuple):
    """A stored layer and the weight (out, in) in fp32 that it was stored from."""

    weight: Tensor
    layer: Any


def measure(
    model: nn.Module, config: Any, paths: list[str], weights: str | Path | Mapping[str, Tensor]
) -> Callable[[str], Stored | None]:
    """The weight that each stored layer was made from, read when it is asked for; None for layers in 16 bits.

    Args:
        weights: the folder with the safetensors files of the base in 16 bits, or its tensors by name.

    Raises:
        UsageError: no target is stored, in other bits than `loftq_bits` says, or weights are not in the files.
    """
    layers = {path: model.get_submodule(path) for path in paths}
    stored = {path: layer for path, layer in layers.items() if isinstance(layer, QuantizedLinear)}
    bits = {8 if layer.packed is not None and layer.packed.kind == "int8" else 4 for layer in stored.values()}
    if not stored:
        raise UsageError(
            "init_lora_weights: 'loftq' makes up for a base in 4 or 8 bits, and this one has no such target; "
            "load it so (quantize: nf4)"
        )
    if bits != {config.loftq_config.loftq_bits}:
        raise UsageError(f"loftq_config.loftq_bits: {config.loftq_config.loftq_bits}, the base is stored in {bits}")
    names, read = _names_and_reader(weights)
    keys = {path: _named(names, f"{path}.weight") for path in stored}
    lines = [f"weights: {len(found)} tensors for '{path}.weight'" for path, found in keys.items() if len(found) != 1]
    raise_all(UsageError, lines[:5])

    def original(path: str) -> Stored | None:
        if path not in stored:
            return None
        layer, weight = stored[path], read(keys[path][0])
        weight = weight.T if hasattr(layer, "nf") else weight  # it was transformers' Conv1D
        if not weight.is_floating_point() or weight.shape != (layer.out_features, layer.in_features):
            raise UsageError(
                f"weights: '{keys[path][0]}' is {tuple(weight.shape)} of {weight.dtype}, the layer "
                f"{(layer.out_features, layer.in_features)}; name the folder of the base in 16 bits"
            )
        return Stored(weight.to(layer.codes.device, torch.float32), layer)

    return original


def _named(names: list[str], wanted: str) -> list[str]:
    """The names that are the same, or else those that are but for what a file or a model has in front."""
    if wanted in names:
        return [wanted]
    return [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]


def _names_and_reader(weights: Any) -> tuple[list[str], Callable[[str], Tensor]]:
    if isinstance(weights, Mapping):
        return list(weights), weights.__getitem__
    files: dict[str, Path] = {}
    try:
        for path in sorted(Path(weights).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"weights: {weights}: not readable: {error}") from error
    if not files:
        raise UsageError(f"weights: {weights}: there are no safetensors files in this folder")

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            return file.get_tensor(name)

    return list(files), read


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """s B A = the best rank-R approximation of W - Q, split evenly; then Q again from W - s B A, and so on."""
    weight, layer = start.measured
    a, b = _halves(weight - layer.weight.float(), r)
    for _ in range(start.options.loftq_iter - 1):
        kept = layer.packed
        blocks = {} if kept.kind == "int8" else {"block_size": kept.block_size, "double": kept.nested is not None}
        stored = quantize(weight - b @ a, kept.kind, compute_dtype=kept.dtype, **blocks)
        type(layer).take_over(layer, stored)
        a, b = _halves(weight - layer.weight.float(), r)
    return a / scaling**0.5, b / scaling**0.5, False


def _halves(residual: Tensor, r: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(residual, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
