"""One call of an adapted module: through the adapters that answer it, for all rows or for each row its own.

Legend: B rows of a batch.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.base import OnModel, in_adapter
from smidgen.adapters.compose import Chain, Mean, has_rows, pick_rows, weighted
from smidgen.adapters.layers import Layer, layer_of
from smidgen.errors import MergeError, UsageError
from smidgen.kernels.dequantize import Packed
from smidgen.quant.linear import QuantizedLinear

_PRODUCTS = (nn.Linear.forward, QuantizedLinear.forward)  # nothing but x W^T + bias


class Below:
    """What lies below one adapter during a call (see `smidgen.adapters.base.Inner`)."""

    def __init__(self, module: Any, names: Chain, ground: Once | None = None):
        self.module = module
        self.names = names
        self.ground = ground  # what lies below the first of the names, if not the module itself

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.names:
            return (self.ground or self.module._base_forward)(*args, **kwargs)
        *below, name = self.names
        return self.module._adapter(name)(Below(self.module, tuple(below), self.ground), *args, **kwargs)

    @property
    def group(self) -> Chain | None:
        rows = self.module._state.rows
        return rows[0] if rows else None

    @property
    def layer(self) -> Layer:
        layer = layer_of(self.module)
        assert layer is not None
        return layer

    def tensors(self) -> dict[str, Tensor]:
        return fold(self.module, self.names, None if self.ground is None else self.ground.tensors())

    @property
    def weight(self) -> Tensor:
        return self.tensors()["weight"]

    @property
    def bias(self) -> Tensor | None:
        return self.tensors().get("bias")

    @property
    def plain_weight(self) -> Tensor | Packed | None:
        module = self.module
        plain = not self.names and self.ground is None and "_inner_forward" not in module.__dict__
        return kept_weight(module) if plain and module._original_class().forward in _PRODUCTS else None

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.layer.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return self.layer.linear(x, self.layer.matrix(weight), bias)

    def call_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        below = self.tensors()
        tensors = {name: tensor.to(below[name].dtype) for name, tensor in tensors.items()}
        if layer_of(self.module) is not None:
            below |= tensors
            return self.apply(args[0], below["weight"], below.get("bias"))
        there = swap(self.module, below | tensors)
        try:
            return self.module._base_forward(*args, **kwargs)
        finally:
            swap(self.module, there)


class Once:
    """What lies below several adapters that are called alike: it answers once for all of them."""

    plain_weight = None  # one operation for the layer and an adapter would compute the layer for each

    def __init__(self, inner: Any):
        self.inner = inner
        self.given: list[Any] | None = None
        self.answer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs, *kwargs.values()]
        if self.given is None or len(given) != len(self.given) or not all(map(operator.is_, given, self.given)):
            self.given, self.answer = given, self.inner(*args, **kwargs)
        return self.answer


class Averaged:
    """An average of adapters at one module; there it stands as one of the adapters."""

    def __init__(self, module: Any, mean: Mean):
        self.module = module
        self.mean = mean
        self.chains = [module._answering(chain) for chain in mean.chains]

    def is_low_rank(self) -> bool:
        return False

    def __call__(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_cache(self.module, args, kwargs)
        ground = Once(inner)
        answers = [Below(self.module, chain, ground)(*args, **kwargs) for chain in self.chains]
        return weighted(answers, self.mean.weights)

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the tensors: it answers as the mean of the answers where these are linear in the tensors."""
        if tensors.keys() - {"weight", "bias"}:
            raise MergeError(f"an average at a {type(self.module).__name__} is no function of its weights")
        each = [fold(self.module, chain, tensors) for chain in self.chains]
        return {name: weighted([folded[name] for folded in each], self.mean.weights) for name in tensors}


class BelowRows:
    """The same for adapters that stand around the whole model, where each row has its own: families answer together."""

    def __init__(self, module: Any, parts: list[list[Any]]):
        self.module = module
        self.parts = parts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.parts:
            return self.module._base_forward(*args, **kwargs)
        *below, adapters = self.parts
        family = next(filter(None, adapters))
        return family.answer_rows(BelowRows(self.module, below), adapters, *args, **kwargs)


def fold(module: Any, names: Iterable[Any], tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The module's tensors (or `tensors`) by name with the adapters `names` merged into them, lowest first."""
    folded = _own_tensors(module) if tensors is None else tensors
    for name in names:
        folded = module._adapter(name).merged(folded)
    return folded


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, QuantizedLinear):
        return {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
    own = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in own if not in_adapter(name)}


# --- rows of a batch ---


def answer_rows(module: Any, rows: list[Chain], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Each row of the batch by its own chain: the rows of one chain are computed together."""
    if not any(has_rows(value, len(rows)) for value in [*args, *kwargs.values()]):
        raise UsageError(
            f"a {type(module).__name__} is not called with the {len(rows)} rows of the batch, so they cannot each "
            "have their own adapter there: call the model once for each adapter"
        )
    if any(isinstance(adapter, OnModel) for adapter in module.adapters.values()):
        here = map(module._answering, rows)
        levels = itertools.zip_longest(*([module.adapters[name] for name in chain] for chain in here))
        parts = [
            [adapter if adapter and adapter.family == family else None for adapter in level]
            for level in levels
            for family in dict.fromkeys(adapter.family for adapter in level if adapter)
        ]
        return BelowRows(module, parts)(*args, **kwargs)
    groups: dict[Chain, list[int]] = {}
    for index, chain in enumerate(rows):  # the same groups at every module
        groups.setdefault(chain, []).append(index)
    if len(groups) == 1:
        return Below(module, module._answering(rows[0]))(*args, **kwargs)
    _refuse_cache(module, args, kwargs)
    answers = []
    try:
        for chain, indices in groups.items():
            module._state.rows = [rows[index] for index in indices]  # of the modules in this one
            pick = functools.partial(pick_rows, count=len(rows), indices=indices)
            named = {name: pick(value) for name, value in kwargs.items()}
            answers.append(Below(module, module._answering(chain))(*map(pick, args), **named))
    finally:
        module._state.rows = rows
    return _join_rows(answers, [index for indices in groups.values() for index in indices])


def _refuse_cache(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """A module that is called several times for one call of the model must not fill a cache."""
    if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
        raise UsageError(
            f"a {type(module).__name__} that is adapted as a whole would fill the cache of keys and values once for "
            "each adapter: call the model with use_cache=False"
        )


def _join_rows(answers: list[Any], order: list[int]) -> Any:
    if isinstance(answers[0], tuple):
        return tuple(_join_rows(list(parts), order) for parts in zip(*answers, strict=True))
    if not isinstance(answers[0], Tensor):
        return answers[0]
    back = torch.empty(len(order), dtype=torch.long, device=answers[0].device)
    back[order] = torch.arange(len(order), device=answers[0].device)
    return torch.cat(answers)[back]


# --- tensors ---


def kept_weight(module: Any) -> Tensor | Packed:
    """The weight of a linear layer as it is kept in memory."""
    return (isinstance(module, QuantizedLinear) and module.packed) or module.weight


def swap(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Put `tensors` into the module by name; answer what was there."""
    there = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        table = holder._parameters if leaf in holder._parameters else holder._buffers
        there[name], table[leaf] = table[leaf], tensor
    return there
