"""Which entries of a weight a sparse method trains: a mask is named in the configuration, never given as code.

Legend: the weight is a matrix (out, in), n the number of entries. A mask answers n flat positions, row after row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.gradients import mean_gradients
from smidgen.adapters.layers import Layer, layer_of
from smidgen.adapters.targets import find_targets
from smidgen.errors import TargetError, UsageError
from smidgen.quant.linear import QuantizedLinear


def _random(layer: Layer, number: int, config: Any) -> Tensor:
    generator = torch.Generator()
    if config.random_seed is not None:
        generator.manual_seed(config.random_seed)
    return torch.randperm(layer.shape[0] * layer.shape[1], generator=generator)[:number]


def _magnitude(layer: Layer, number: int, config: Any) -> Tensor:
    weight = layer.module.weight.detach()
    if weight.is_meta:
        raise TargetError("mask_type: 'magnitude' reads the weight, which is offloaded: load it into memory")
    return layer.matrix(weight).abs().flatten().topk(number).indices


def _scored(layer: Layer, number: int, config: Any) -> Tensor:
    if config.scores is None:  # the positions are about to be read from the file
        return torch.arange(number)
    return config.scores.flatten().topk(number).indices


MASKS: dict[str, Callable[[Layer, int, Any], Tensor]] = {
    "random": _random,
    "magnitude": _magnitude,
    "gradient": _scored,
    "fisher": _scored,
}
DATA_MASKS = ("gradient", "fisher")


def score_weights(model: nn.Module, config: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """How much data moves each entry of the target weights: their scores (out, in) by path, in fp32.

    With `mask_type` "gradient" that is the size of the mean gradient of the loss, with "fisher" the mean of its
    squares, the diagonal of the empirical Fisher information (exact with batches of one row).

    Args:
        batches: keyword arguments of calls of the model, with labels, so that it answers a loss.

    Raises:
        UsageError: the mask needs no data, there are no batches, the model answers no loss, or weights are stored.
    """
    if config.mask_type not in DATA_MASKS:
        raise UsageError(f"mask_type: '{config.mask_type}' needs no data; {' and '.join(DATA_MASKS)} do")
    paths = find_targets(model, config)
    if any(isinstance(model.get_submodule(path), QuantizedLinear) for path in paths):
        raise UsageError(
            f"mask_type: '{config.mask_type}' needs gradients of weights, and those stored in 4 or 8 bits take none; "
            "take 'random' or 'magnitude', or score the 16-bit model"
        )
    means = mean_gradients(model, paths, batches, torch.square if config.mask_type == "fisher" else torch.clone)
    layers = [layer_of(model.get_submodule(path)) for path in paths]
    found = zip(paths, layers, means, strict=True)
    return {path: layer.matrix(mean).abs() for path, layer, mean in found if layer is not None}
