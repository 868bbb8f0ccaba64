"""A and B from the gradient of the weight, so that the first steps go where full fine-tuning's would.

The base answers without their product (LoRA-GA, https://arxiv.org/abs/2407.05000). Legend: the weight is (out, in),
G its gradient, R rank, s the scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smidgen.adapters.gradients import mean_gradients
from smidgen.adapters.init import Start, leading_directions
from smidgen.adapters.init.inputs import Batch
from smidgen.adapters.layers import layer_of
from smidgen.errors import UsageError
from smidgen.quant.linear import QuantizedLinear


@dataclass(kw_only=True)
class LoraGAConfig:
    """What is particular to LoRA-GA.

    Args:
        direction: which of the 2 R leading directions of the gradient go to A and B: "ArB2r" the first R to A and the
            second to B, "A2rBr" the reverse, "ArBr" by turns, "random" the same random ones to both.
        scale: how B is scaled: "stable" by out^(1/4) / sqrt(stable_gamma), "weight_svd" to the largest singular value
            of the weight, "gd_scale" A and B by 1/s, "unit" not at all.
        stable_gamma: for "stable".
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        if self.stable_gamma < 1:
            raise UsageError(f"lora_ga_config.stable_gamma: must be a whole number from 1, got {self.stable_gamma}")


def measure(model: nn.Module, config: Any, paths: list[str], batches: list[Batch]) -> Callable[[str], Tensor]:
    """The mean gradient (out, in) of each layer's weight over the batches.

    Raises:
        UsageError: the model answers no loss, or weights are stored in 4 or 8 bits.
    """
    if any(isinstance(model.get_submodule(path), QuantizedLinear) for path in paths):
        raise UsageError(
            "init_lora_weights: 'lora_ga' needs gradients of weights, and those stored in 4 or 8 bits take none; "
            "take 'eva' or 'corda', or load the base in 16 bits"
        )
    gradients = dict(zip(paths, mean_gradients(model, paths, batches), strict=True))

    def gradient(path: str) -> Tensor:
        layer = layer_of(model.get_submodule(path))
        assert layer is not None
        return layer.matrix(gradients.pop(path))

    return gradient


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """G = U S V^T: A = rows of V^T, B = columns of U S, scaled."""
    options = start.options
    u, s, vh = leading_directions(start.measured, 4 * r, niter=4, seed=0)
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    if options.direction == "random":
        first = torch.randperm(2 * r)[:r]
    of_a, of_b = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (2 * torch.arange(r) + 1, 2 * torch.arange(r)),
        "random": (first, first),
    }[options.direction]
    of_a, of_b = (index[index < len(s)] for index in (of_a, of_b))
    a, b = vh[of_a], u[:, of_b] * s[of_b]
    if options.scale == "stable":
        b = b * (start.shape[0] ** 0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd" and s[of_b[0]] > 0:
        _, largest, _ = leading_directions(start.read(), r, niter=4, seed=0)
        b = b * (largest[0] / s[of_b[0]])
    elif options.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a.contiguous(), b.contiguous(), True
