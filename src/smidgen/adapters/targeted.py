"""Families of methods that are functions of the weight of single layers: what they share, written once.

Legend: the weight is a matrix (out, in), whatever the kind of the layer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner, Place, WeightAdapter
from smidgen.adapters.layers import EmbeddingLayer, Layer, LinearLayer, layer_of
from smidgen.adapters.targets import ALL_LINEAR, check_patterns, find_targets, pattern_value
from smidgen.adapters.trained import plan_trained, with_mirrors
from smidgen.errors import TargetError, raise_all


class Targeted(WeightAdapter):
    """A new weight for each target layer, and a trained copy of its bias where the configuration asks for it."""

    # The kinds of layer that the method is defined for; linear layers include transformers' Conv1D.
    kinds: ClassVar[tuple[type[Layer], ...]] = (LinearLayer,)
    bias: nn.Parameter | None

    @classmethod
    def plan(cls, model: nn.Module, config: Any) -> Iterator[Place]:
        if config.target_modules is None:
            config.target_modules = cls.default_targets(model)
        targets = find_targets(model, config)
        problems = list(cls.misfits(model, targets))
        for field in config.patterns:
            problems += check_patterns(getattr(config, field), targets, field)
        raise_all(TargetError, problems)
        places = [Place(path, cls, cls.place_config(config, path)) for path in targets]
        yield from with_mirrors(model, [*places, *plan_trained(model, config, targets)], ensure_weight_tying=False)

    @classmethod
    def default_targets(cls, model: nn.Module) -> list[str] | str:
        """What `target_modules` is where the configuration does not say."""
        return ALL_LINEAR

    @classmethod
    def misfits(cls, model: nn.Module, targets: list[str]) -> Iterator[str]:
        """A line for each target whose kind of layer the method is not defined for."""
        kinds = ", ".join(kind.kind for kind in cls.kinds)
        for path in targets:
            module = model.get_submodule(path)
            if not isinstance(layer_of(module), cls.kinds):
                yield f"target_modules: '{path}' is a {type(module).__name__}; {cls.__name__} adapts {kinds}"

    @classmethod
    def place_config(cls, config: Any, path: str) -> Any:
        """The configuration of one place: `config` with its patterns resolved."""
        if not config.patterns:
            return config
        values = {
            field: pattern_value(getattr(config, pattern), path, getattr(config, field))
            for pattern, field in config.patterns.items()
        }
        return replace(config, **values)

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__(base, config, shared)
        self.bias = None
        if getattr(config, "bias", "none") != "none" and getattr(base, "bias", None) is not None:
            self.bias = nn.Parameter(base.bias.detach().float().clone())

    def changed(self, matrix: Tensor) -> Tensor:
        """The weight that the method makes of `matrix` (out, in)."""
        raise NotImplementedError

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.layer.store(self.changed(self.layer.matrix(weight))), bias if self.bias is None else self.bias

    def below(self, inner: Inner, x: Tensor) -> Tensor:
        """What lies below answers to `x`, with the trained bias where there is one."""
        return inner(x) if self.bias is None else inner.call_with({"bias": self.bias}, x)

    def file_key(self, path: str, name: str) -> str:
        return super().file_key(path, "base_layer.bias" if name == "bias" else name)


class Additive(Targeted):
    """W + `delta`: what is added is computed apart, in the base's dtype, so that no weight is read."""

    latency = "large"

    def delta(self) -> Tensor:
        """What is added to the weight, (out, in)."""
        raise NotImplementedError

    def changed(self, matrix: Tensor) -> Tensor:
        return matrix + self.delta()

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = self.below(inner, x)
        return y + self.layer.linear(x.to(y.dtype), self.delta().to(y.dtype))


class Factored(Additive):
    """W + B A with A (R, in) and B (out, R); dropout acts on the inputs of A."""

    latency = "small"
    dropout: nn.Dropout

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R)."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        a, b = self.factors()
        return b @ a

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        y = self.below(inner, x)
        a, b = (factor.to(y.dtype) for factor in self.factors())
        return y + self.layer.pointwise(self.layer.linear(self.dropout(x.to(y.dtype)), a), b)


class Rotation(Targeted):
    """W R^T: a linear layer's inputs are rotated, an embedding's answers, or the weight itself."""

    def rotate(self, x: Tensor, back: bool = False) -> Tensor:
        """x R along the last dimension (in,) of `x`; x R^T where `back`."""
        raise NotImplementedError

    def changed(self, matrix: Tensor) -> Tensor:
        if isinstance(self.layer, EmbeddingLayer):
            return self.rotate(matrix.T).T
        return self.rotate(matrix, back=True)

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        if isinstance(self.layer, EmbeddingLayer):
            return self.rotate(inner(x))
        if isinstance(self.layer, LinearLayer):
            return self.below(inner, self.rotate(x))
        return super().forward(inner, x)


class Blocks(Rotation):
    """A rotation of blocks of neighbouring inputs, each by its own small orthogonal matrix."""

    dropout: float  # the share of blocks that are not rotated in a training step

    def turn(self, x: Tensor, minus_identity: Tensor, back: bool) -> Tensor:
        """`x` (..., N n) times the block diagonal of I + `minus_identity` (N, n, n), or its transpose.

        The identity is added last, so that a small rotation is not lost in a narrow dtype.
        """
        if self.training and self.dropout:
            kept = torch.rand(len(minus_identity), 1, 1, device=x.device) >= self.dropout
            minus_identity = minus_identity * kept
        blocks = minus_identity.mT if back else minus_identity
        parts = x.unflatten(-1, blocks.shape[:2])
        return x + torch.einsum("...nk,nkc->...nc", parts, blocks.to(x.dtype)).flatten(-2)


def device_of(base: Any) -> torch.device:
    """Where a module computes: where its tensors are, or where a hook takes them when they are offloaded."""
    tensors = itertools.chain(base.parameters(recurse=False), base.buffers(recurse=False))
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        return torch.device(getattr(getattr(base, "_hf_hook", None), "execution_device", None) or "cpu")
    return device


def uniform(*shape: int, device: torch.device) -> nn.Parameter:
    """A parameter that starts uniform, as the weight of ``nn.Linear`` does."""
    parameter = nn.Parameter(torch.empty(*shape, device=device))
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter
