"""(IA)^3: learned factors for the keys, the values and the inner activations of the feed-forward layers.

Source: https://arxiv.org/abs/2205.05638. Legend: the weight is a matrix (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner, Place, base_modules
from smidgen.adapters.config import TargetConfig
from smidgen.adapters.layers import ConvLayer, LinearLayer, is_linear
from smidgen.adapters.targeted import Targeted, device_of
from smidgen.adapters.targets import Pattern, ends_with, language_half
from smidgen.errors import TargetError, raise_all

# What layers are called in the models of transformers: they compute keys and values, or read the inner activations.
_KEYS_VALUES = ("k_proj", "v_proj", "k", "v", "key", "value", "key_proj", "value_proj", "query_key_value", "c_attn")
_FEED_FORWARD = ("down_proj", "fc2", "wo", "output.dense", "dense_4h_to_h", "mlp.c_proj", "fc_out", "w2")


@dataclass(kw_only=True)
class IA3Config(TargetConfig):
    """The configuration of (IA)^3.

    Args:
        feedforward_modules: those of the target modules whose inputs are scaled, not their outputs: names or a
            regular expression. None finds them by their usual names.
        init_ia3_weights: start as the base model; False is a random start.
    """

    peft_type: ClassVar[str] = "IA3"
    beyond_format: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True


@dataclass(frozen=True)
class IA3Place:
    """One place: how it starts, and whether its inputs are scaled."""

    init_ia3_weights: bool
    scales_inputs: bool


class IA3(Targeted):
    """y = l * (x W^T + b); at feed-forward layers y = (l * x) W^T + b. `ia3_l` (out, 1) or (1, in) is trained."""

    config_class = IA3Config
    kinds = (LinearLayer, ConvLayer)

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str]:
        half = language_half(model)
        linear = [path for path, module in base_modules(model) if is_linear(module) and path.startswith(half)]
        found = [name for name in (*_KEYS_VALUES, *_FEED_FORWARD) if any(ends_with(path, name) for path in linear)]
        if not found:
            raise TargetError("target_modules: no keys, values or feed-forward layers known by name; name the targets")
        return [path for path in linear if any(ends_with(path, name) for name in found)] if half else found

    @classmethod
    def plan(cls, model: nn.Module, config: IA3Config) -> Iterator[Place]:
        places = list(super().plan(model, config))
        mine = [place.path for place in places if place.adapter is cls]
        wanted = config.feedforward_modules
        if wanted is None:
            wanted = [name for name in _FEED_FORWARD if any(ends_with(path, name) for path in mine)]
            config.feedforward_modules = wanted
        if isinstance(wanted, str):
            pattern = Pattern(wanted, "feedforward_modules")
            inputs = {path for path in mine if pattern.matches(path)}
        else:
            inputs = {path for path in mine if any(ends_with(path, name) for name in wanted)}
            idle = [name for name in wanted if not any(ends_with(path, name) for path in mine)]
            problem = "feedforward_modules: '{}' matches none of the target modules"
            raise_all(TargetError, [problem.format(name) for name in idle])
        for place in places:
            own = IA3Place(config.init_ia3_weights, place.path in inputs)
            yield replace(place, config=own) if place.adapter is cls else place

    def __init__(self, base: Any, config: IA3Place, shared: Any = None):
        super().__init__(base, config, shared)
        self.scales_inputs, self.groups = config.scales_inputs, getattr(base, "groups", 1)
        out, inputs = self.layer.shape
        kernel = base.weight.shape[2:] if isinstance(self.layer, ConvLayer) else ()
        channels = inputs // math.prod(kernel) * self.groups if self.scales_inputs else out
        shape = (1, channels, *[1] * len(kernel)) if kernel or self.scales_inputs else (channels, 1)
        start = torch.ones if config.init_ia3_weights else torch.randn
        self.ia3_l = nn.Parameter(start(shape, device=device_of(base)))

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        matrix, scale = self.layer.matrix(weight), self.ia3_l.flatten()
        if not self.scales_inputs:
            return self.layer.store(scale[:, None] * matrix), None if bias is None else scale * bias
        # Each input channel has as many columns as the kernel has places; each group of outputs has its own channels.
        columns = scale.view(self.groups, -1).repeat_interleave(self._kernel(), dim=1)
        rows = columns if self.groups == 1 else columns.repeat_interleave(len(matrix) // self.groups, dim=0)
        return self.layer.store(rows * matrix), bias

    def _kernel(self) -> int:
        return self.layer.shape[1] * self.groups // self.ia3_l.numel()

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        if self.scales_inputs:
            return inner(self._scaled(x))
        return self._scaled(inner(x))

    def _scaled(self, x: Tensor) -> Tensor:
        """l * x as x + (l - 1) x: what was learned beside the 1 would be lost in a narrow dtype."""
        scale = self.ia3_l.flatten() - 1
        if isinstance(self.layer, ConvLayer):
            scale = self.layer.channels(scale)
        return torch.addcmul(x, x, scale.to(x.dtype))
