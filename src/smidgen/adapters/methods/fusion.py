"""AdapterFusion: for each token, attention over what several frozen adapters add to a layer's answer
(https://arxiv.org/abs/2005.00247).

Legend: n adapters at one place, D width of the layer's answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from smidgen.adapters.answering import Once
from smidgen.adapters.attach import adapted_modules
from smidgen.adapters.base import Adapter, Inner, OnModel, Place
from smidgen.adapters.blocks import Reader
from smidgen.adapters.config import TASK_HEADS, PeftConfig
from smidgen.adapters.hub import FUSION, place_names
from smidgen.adapters.layers import EmbeddingLayer, LinearLayer, layer_of, product
from smidgen.adapters.methods.bottleneck import Bottleneck
from smidgen.adapters.trained import Mirror, TokenRows, TrainedCopy, plan_trained
from smidgen.errors import TargetError, raise_all

_SPREAD = 0.02  # of query and key at the start
_OFF_DIAGONAL = 1e-6  # of value at the start, an identity but for that
_WIDEST = 16_384  # a head of a vocabulary would get three matrices of its size squared
_HEADS = {head for heads in TASK_HEADS.values() for head in heads}


@dataclass(kw_only=True)
class FusionConfig(PeftConfig):
    """The configuration of AdapterFusion, in adapter-hub's form with a value matrix and its residual afterwards.

    Args:
        adapters: the adapters it chooses among: folders, or names of adapters on the model. They stay as they are.
        regularization: weight in the loss of ||V - I||^2, summed over the places.
    """

    peft_type: ClassVar[str] = "ADAPTER_FUSION"
    files: ClassVar[str] = "smidgen"

    adapters: list[str] = field(default_factory=list)
    regularization: float = 0.01

    def problems(self) -> list[str]:
        lines = super().problems()
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            lines.append(f"adapters: needs folders or names of adapters, each once, got {self.adapters}")
        if self.regularization < 0:
            lines.append(f"regularization: must be 0 or more, got {self.regularization}")
        return lines


class FusionPlace(NamedTuple):
    """One place: the configuration, the names of the adapters that add to its answer, and what files call it."""

    config: FusionConfig
    names: list[str]
    key: str


class Fusion(Adapter):
    """y + V sum_i p_i u_i with p = softmax_i((Q h) . (K u_i)): u_i is what adapter i adds, h what the last one reads.

    Q (D, D) and K (D, D) have biases. They are left out where one adapter stands alone, whose p is 1.
    """

    config_class = FusionConfig
    latency = "large"

    @classmethod
    def plan(cls, model: Any, config: FusionConfig) -> Iterator[Place]:
        there = model._adapters.configs
        problems = [f"adapters: the model has no '{name}'" for name in config.adapters if name not in there]
        places = []
        for path, module in adapted_modules(model):
            here = {name: module.adapters[name] for name in config.adapters if name in module.adapters}
            if path.rpartition(".")[2] in _HEADS and all(isinstance(adapter, TrainedCopy) for adapter in here.values()):
                continue  # a head is of one task: the fusion's own stands there, or the base's
            adding = [name for name in here if not isinstance(here[name], Reader)]
            told = [(name, _unfit(module, here[name])) for name in adding]
            problems += [f"'{name}' at {path or 'the whole model'}: {reason}" for name, reason in told if reason]
            named = any(isinstance(adapter, Bottleneck) for adapter in here.values())
            place = FusionPlace(config, adding, place_names(model)[path] if named else path)
            places += [Place(path, cls, place)] * bool(here)
        raise_all(TargetError, problems)
        yield from places
        yield from plan_trained(model, config, [])

    def __init__(self, base: Any, config: FusionPlace, shared: Any = None):
        super().__init__(base, config, shared)
        self.options, self.names, self.place = config.config, config.names, config.key
        if not self.names:
            return
        layer = layer_of(base)
        assert layer is not None
        width, device = layer.shape[0], layer.device
        if len(self.names) > 1:
            self.query, self.key = (nn.Linear(width, width, device=device) for _ in range(2))
            for linear in (self.query, self.key):
                nn.init.normal_(linear.weight, std=_SPREAD)
                nn.init.zeros_(linear.bias)
        self.value = nn.Linear(width, width, bias=False, device=device)
        self.value.weight.data.fill_(_OFF_DIAGONAL).fill_diagonal_(1.0)

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        adapters, below = inner.module.adapters, Once(inner)
        for name in self.options.adapters:
            if name in adapters and name not in self.names:
                adapters[name](below, x)  # it reads here what it uses elsewhere
        y = below(x)
        if not self.names:
            return y
        query, updates = y, []
        for name in self.names:
            query, update = adapters[name].added(below, x, y)
            updates.append(update)
        chosen = self._attend(query, torch.stack(updates, dim=-2)) if len(updates) > 1 else updates[0]
        return y + product(self.value, chosen)

    def _attend(self, query: Tensor, updates: Tensor) -> Tensor:
        """The mean (..., D) of `updates` (..., n, D), weighted by how they answer to `query` (..., D)."""
        scores = (product(self.key, updates) @ product(self.query, query)[..., None])[..., 0]
        weights = scores.float().softmax(-1).to(updates.dtype)
        return (weights[..., None, :] @ updates)[..., 0, :]  # V is linear: it is applied to the sum

    def penalty(self) -> Tensor | None:
        if not self.names or not self.options.regularization or not self.value.weight.requires_grad:
            return None
        unit = torch.eye(len(self.value.weight), device=self.value.weight.device)
        return self.options.regularization * (unit - self.value.weight).square().sum()

    def file_key(self, path: str, name: str) -> str:
        return f"{self.place}.{FUSION}.{','.join(self.options.adapters)}.{name}"


def _unfit(module: Any, adapter: Any) -> str | None:
    """Why what an adapter adds to a module's answers cannot be fused; None where it can."""
    if isinstance(adapter, OnModel):
        return "stands before the rows of the whole model, and adds to no layer: stack it"
    if isinstance(adapter, TrainedCopy | TokenRows | Mirror | Fusion):
        return f"a {type(adapter).__name__} stands in place of something, and adds nothing: train it without that"
    layer = layer_of(module)
    if not isinstance(layer, LinearLayer | EmbeddingLayer):
        return f"the outputs of a {type(module).__name__} cannot be fused"
    width = layer.shape[0]
    return f"{width:,} outputs are too many for matrices of that width" if width > _WIDEST else None
