"""LoRA: a low-rank update beside each target weight (https://arxiv.org/abs/2106.09685).

Also rank-stabilised scaling (rsLoRA, https://arxiv.org/abs/2312.03732) and weight decomposition (DoRA,
https://arxiv.org/abs/2402.09353).

Legend: the weight is a matrix (out, in), R the rank, s the scaling.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smidgen.adapters.base import Inner, Place
from smidgen.adapters.experts import ParameterLora, check_options
from smidgen.adapters.layers import ConvLayer, LinearLayer, TransposedLinearLayer
from smidgen.adapters.lora_config import LoraConfig, LoraPlace
from smidgen.adapters.lora_factors import LoraFactors
from smidgen.adapters.targets import ALL_LINEAR, check_patterns, find_parameters, find_targets, pattern_value
from smidgen.adapters.trained import plan_trained, with_mirrors
from smidgen.errors import MergeError, TargetError, raise_all
from smidgen.kernels.lora import LowRank, as_one, lora_linear


class Lora(LoraFactors):
    """y = x W^T + s B A dropout(x): A (R, in) and B (out, R) are trained."""

    config_class = LoraConfig

    lora_magnitude_vector: Any  # a parameter of (out,) numbers, or None without DoRA

    @classmethod
    def plan(cls, model: nn.Module, config: LoraConfig) -> Iterator[Place]:
        if config.target_modules is None:
            config.target_modules = ALL_LINEAR
        config.check_start()
        stacks = find_parameters(model, config.target_parameters or [])
        targets = [] if stacks and config.target_modules == [] else find_targets(model, config)
        problems = check_options(config, stacks, targets) if stacks else []
        adapted = targets + [f"{path}.{name}" for path, names in stacks.items() for name in names]
        problems += check_patterns(config.rank_pattern, adapted, "rank_pattern")
        problems += check_patterns(config.alpha_pattern, adapted, "alpha_pattern")
        raise_all(TargetError, problems)
        places = [Place(path, cls, cls._place(config, path)) for path in targets]
        for path, names in stacks.items():
            places.append(Place(path, ParameterLora, {name: cls._place(config, f"{path}.{name}") for name in names}))
        places += plan_trained(model, config, targets)
        yield from with_mirrors(model, places, config.ensure_weight_tying)

    @staticmethod
    def _place(config: LoraConfig, path: str) -> LoraPlace:
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        return LoraPlace(config, r, config.scaling(r, alpha), (config.starts or {}).get(path))

    def __init__(self, base: Any, config: LoraPlace, shared: Any = None):
        super().__init__(base, config)
        options, layer = config.config, self.layer
        self.bias = None
        if options.bias != "none" and getattr(base, "bias", None) is not None:
            self.bias = nn.Parameter(base.bias.detach().float().clone())
        self.lora_magnitude_vector = None
        if options.use_dora:
            _, norm = self._direction(layer.matrix(base.weight.detach()))
            shape = (1, -1, *[1] * (base.weight.dim() - 2)) if isinstance(layer, ConvLayer) else (-1,)
            self.lora_magnitude_vector = nn.Parameter(norm.float().view(shape).contiguous())

    def _direction(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The updated weight (out, in) and the norm (out,) of each of its rows; `weight` is the layer's matrix."""
        a, b = self.factors()
        updated = weight + self.scaling * (b @ a)
        if self.start_A is not None:
            updated = updated - self.scaling * (self.start_B @ self.start_A)
        return updated, updated.norm(dim=1)

    def _magnitude(self, weight: Tensor) -> Tensor:
        """DoRA's factor (out,) for each output. The norm takes no gradient (DoRA, section 4.3)."""
        return self.lora_magnitude_vector.flatten() / self._direction(weight)[1].detach()

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.groups > 1:
            raise MergeError(
                f"an update that mixes the channels of {self.groups} groups does not fit the grouped weight"
            )
        matrix = self.layer.matrix(weight)
        merged, _ = self._direction(matrix)
        bias = bias if self.bias is None else self.bias
        update = self._update_bias()
        if self.lora_magnitude_vector is not None:
            magnitude = self._magnitude(matrix)
            merged = magnitude[:, None] * merged
            update = None if update is None else magnitude * update
        if update is not None:
            bias = self.scaling * update + (0 if bias is None else bias)
        return self.layer.store(merged), bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        layer = self.layer
        if (weight := inner.plain_weight) is not None and self.is_low_rank() and as_one(x, weight):
            return lora_linear(x, weight, inner.bias, [self.low_rank()])
        y = inner(x) if self.bias is None else inner.call_with({"bias": self.bias}, x)
        if self.start_A is not None:
            y = y - self._low_rank(x, y.dtype, self.start_A, self.start_B)
        dropped = self.dropout(x) if x.is_floating_point() else x
        update = self._low_rank(dropped, y.dtype, *self.factors(), bias=self._update_bias())
        if self.lora_magnitude_vector is None:
            return y + update
        weight = layer.matrix(inner.weight)
        magnitude = layer.channels(self._magnitude(weight)).to(y.dtype)
        if dropped is x:
            bias = inner.bias if self.bias is None else self.bias
            base = y if bias is None else y - layer.channels(bias.to(y.dtype))
        else:
            base = layer.linear(dropped.to(weight.dtype), weight)
            if self.start_A is not None:
                base = base - self._low_rank(dropped, y.dtype, self.start_A, self.start_B)
        return y + (magnitude - 1) * base + magnitude * update

    def beside_factors(self) -> list[str]:
        """The options by which this adapter is more than s B A."""
        parts = {
            "init_lora_weights": self.start_A,
            "use_dora": self.lora_magnitude_vector,
            "bias": self.bias,
            "lora_bias": self._update_bias(),
        }
        return [option for option, part in parts.items() if part is not None]

    def is_low_rank(self) -> bool:
        rows = isinstance(self.layer, LinearLayer) and not isinstance(self.layer, TransposedLinearLayer)
        return rows and not self.beside_factors()

    def low_rank(self) -> LowRank:
        return LowRank.drawn(*self.factors(), self.scaling, self.dropout)
