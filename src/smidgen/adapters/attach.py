"""Attaching adapters in place: a module keeps its object, name and weights and gains a class in front of its own.

`torch.nn.utils.parametrize` does the same: the class becomes a subclass ``(Adapted, OriginalClass)`` made once. A
module's parameters keep their names; an adapter's stand at ``<module>.adapters.<adapter name>.<parameter>``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Adapter, Place, base_modules, in_adapter
from smidgen.adapters.layers import Layer, layer_of
from smidgen.adapters.trained import Mirror
from smidgen.errors import MergeError, TargetError, UsageError, raise_all
from smidgen.kernels.dequantize import Packed
from smidgen.kernels.lora import Linear
from smidgen.quant.linear import QuantizedLinear

_PRODUCTS = (nn.Linear.forward, QuantizedLinear.forward)  # nothing but x W^T + bias
BASE = "__base__"  # the name that asks for no adapter at all, for a row of a batch


@dataclass
class State:
    """What the adapted modules of one model share: which adapters there are and which answer now."""

    configs: dict[str, Any] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    rows: list[str] | None = None  # an adapter's name for each row of the batch of this call


# --- classes made once ------------------------------------------------------------------------------------------


@functools.cache
def class_with(mixin: type, original: type) -> type:
    """The subclass ``(mixin, original)`` that carries the original's name; made once for each pair."""
    namespace = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (mixin, original), namespace)


def class_without(cls: type, mixin: type) -> type:
    """`cls` with `mixin` taken out, also from below classes that were put in front later (FSDP2 does so)."""
    if mixin not in cls.__mro__:
        return cls
    if cls.__bases__[0] is mixin:
        return cls.__bases__[1]
    bases = tuple(class_without(base, mixin) for base in cls.__bases__)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, body)


# --- one call ---------------------------------------------------------------------------------------------------


class Below:
    """What lies below one adapter during a call (see `smidgen.adapters.base.Inner`)."""

    def __init__(self, module: Any, names: list[str]):
        self.module = module
        self.names = names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.names:
            return self.module._base_forward(*args, **kwargs)
        *below, name = self.names
        return self.module.adapters[name](Below(self.module, below), *args, **kwargs)

    @property
    def layer(self) -> Layer:
        layer = layer_of(self.module)
        assert layer is not None
        return layer

    def _tensors(self) -> dict[str, Tensor]:
        return fold(self.module, self.names)

    @property
    def weight(self) -> Tensor:
        return self._tensors()["weight"]

    @property
    def bias(self) -> Tensor | None:
        return self._tensors().get("bias")

    @property
    def plain_weight(self) -> Tensor | Packed | None:
        module = self.module
        plain = not self.names and "_inner_forward" not in module.__dict__
        return kept_weight(module) if plain and module._original_class().forward in _PRODUCTS else None

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        dtype = self.layer.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return self.layer.linear(x, self.layer.matrix(weight), bias)

    def call_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        below = self._tensors()
        tensors = {name: tensor.to(below[name].dtype) for name, tensor in tensors.items()}
        if layer_of(self.module) is not None:
            below |= tensors
            return self.apply(args[0], below["weight"], below.get("bias"))
        there = _swap(self.module, below | tensors)
        try:
            return self.module._base_forward(*args, **kwargs)
        finally:
            _swap(self.module, there)


def fold(module: Any, names: list[str]) -> dict[str, Tensor]:
    """The module's tensors by name with the adapters `names` merged into them, lowest first."""
    tensors = _own_tensors(module)
    for name in names:
        tensors = module.adapters[name].merged(tensors)
    return tensors


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, QuantizedLinear):
        return {"weight": module.weight} | ({} if module.bias is None else {"bias": module.bias})
    own = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor for name, tensor in own if not in_adapter(name)}


# --- the class in front -----------------------------------------------------------------------------------------


class MadeInPlace:
    """A class made in place has no name to be found by: deepcopy keeps it, pickle is refused in plain words."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UsageError(
            "an adapted model cannot be pickled: save the adapter with save_pretrained(folder), "
            "or state_dict() as safetensors, and load it onto the base model"
        )


class Adapted(MadeInPlace):
    """Put in front of a module's class: its calls go through the adapters that are active.

    Others set ``module.forward`` on the instance (accelerate's hooks, mixed precision). What was set before the
    adapters came lies below them; what is set later wraps them; and what puts an older forward back, as removing
    such a hook does, changes only what lies below. No order of attaching and hooking silences an adapter.
    """

    is_adapted = True
    adapters: nn.ModuleDict
    _state: State
    _merged: list[str]
    _replaced: dict[str, nn.Parameter | None]

    # Set on the instance: `_inner_forward`, what an instance's forward was before; `_outer_forward`, set later.

    @property
    def forward(self) -> Callable[..., Any]:
        outer = self.__dict__.get("_outer_forward")
        return self._answer if outer is None else outer

    @forward.setter
    def forward(self, value: Callable[..., Any]) -> None:
        functions = list(_wrapped_functions(value))
        if functions[0] is Adapted._answer:
            self.__dict__.pop("_outer_forward", None)
        elif Adapted._answer in functions:
            self.__dict__["_outer_forward"] = value
        elif self._original_class().forward in functions:
            self.__dict__["_inner_forward"] = value
            self.__dict__.pop("_outer_forward", None)
        else:
            self.__dict__["_outer_forward"] = functools.partial(_prove_reached, self, value)

    @forward.deleter
    def forward(self) -> None:
        self.__dict__.pop("_outer_forward", None)

    def _original_class(self) -> Any:
        return class_without(type(self), Adapted)

    def _base_forward(self, *args: Any, **kwargs: Any) -> Any:
        instance_forward = self.__dict__.get("_inner_forward")
        if instance_forward is not None:
            return instance_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if "_reached" in self.__dict__:
            self.__dict__["_reached"] = True
        state = self._state
        if not state.enabled:
            return self._base_forward(*args, **kwargs)
        if state.rows is not None:
            return self._answer_rows(state.rows, args, kwargs)
        return Below(self, self._answering(state.active))(*args, **kwargs)

    def _answering(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.adapters and name not in self._merged]

    def _answer_rows(self, rows: list[str], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Each row of the batch by its own adapter: the rows of one adapter are computed together."""
        if not any(_has_rows(value, len(rows)) for value in [*args, *kwargs.values()]):
            raise UsageError(
                f"a {type(self).__name__} is not called with the {len(rows)} rows of the batch, so they cannot each "
                "have their own adapter there: call the model once for each adapter"
            )
        groups = {name: [i for i, row in enumerate(rows) if row == name] for name in dict.fromkeys(rows)}
        answers = {}
        for name, indices in groups.items():
            pick = functools.partial(_pick_rows, count=len(rows), indices=indices)
            names = self._answering([name])
            answers[name] = Below(self, names)(
                *[pick(value) for value in args], **{key: pick(value) for key, value in kwargs.items()}
            )
        order = [index for indices in groups.values() for index in indices]
        return _join_rows(list(answers.values()), order)


def _wrapped_functions(value: Any) -> Iterator[Any]:
    """The functions that a forward is made of, outermost first: bound methods and ``functools.wraps`` are followed."""
    while value is not None:
        value = getattr(value, "__func__", value)
        yield value
        value = getattr(value, "__wrapped__", None)


def _prove_reached(module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a forward of unknown make; it must come to the adapters, or they would silently do nothing."""
    module.__dict__["_reached"] = False
    answer = forward(*args, **kwargs)
    if not module.__dict__.pop("_reached"):
        raise UsageError(
            f"the forward that was set on a {type(module).__name__} after its adapters were attached does not call "
            "the one it replaced, so the adapters would do nothing: set it before attaching, or wrap module.forward"
        )
    return answer


def _has_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count


def _pick_rows(value: Any, count: int, indices: list[int]) -> Any:
    return value[indices] if _has_rows(value, count) else value


def _join_rows(answers: list[Any], order: list[int]) -> Any:
    if isinstance(answers[0], tuple):
        return tuple(_join_rows(list(parts), order) for parts in zip(*answers, strict=True))
    if not isinstance(answers[0], Tensor):
        return answers[0]
    back = torch.empty(len(order), dtype=torch.long, device=answers[0].device)
    back[order] = torch.arange(len(order), device=answers[0].device)
    return torch.cat(answers)[back]


def is_low_rank(module: Any) -> bool:
    """Whether the module is a plain linear layer now, or one with adapters that each add a low-rank update."""
    if not isinstance(module, Adapted):
        return type(module) in (nn.Linear, QuantizedLinear) and "forward" not in vars(module)
    instance_forward = module.__dict__.keys() & {"_inner_forward", "_outer_forward"}
    plain = (
        module._original_class() in (nn.Linear, QuantizedLinear) and not instance_forward and module._state.rows is None
    )
    return plain and all(adapter.is_low_rank() for adapter in _answering_adapters(module))


def linear_of(module: Any) -> Linear:
    """A module of which `is_low_rank` holds, with the updates of one call."""
    updates = tuple(adapter.low_rank() for adapter in _answering_adapters(module))
    return Linear(kept_weight(module), module.bias, updates)


def kept_weight(module: Any) -> Tensor | Packed:
    """The weight of a linear layer as it is kept in memory."""
    return (isinstance(module, QuantizedLinear) and module.packed) or module.weight


def _answering_adapters(module: Any) -> list[Any]:
    if not isinstance(module, Adapted) or not module._state.enabled:
        return []
    return [module.adapters[name] for name in module._answering(module._state.active)]


# --- attaching and detaching ------------------------------------------------------------------------------------


def adapted_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Every module of `model` that has adapters, by path."""
    for path, module in base_modules(model):
        if isinstance(module, Adapted):
            yield path, module


def adapters_of(model: Any, name: str) -> Iterator[tuple[str, Adapter]]:
    """Every place of the adapter `name`, by the path of its module."""
    for path, module in adapted_modules(model):
        if name in module.adapters:
            yield path, module.adapters[name]


def check_adapter_name(name: str) -> None:
    """Refuse a name that cannot be part of a parameter's name."""
    if not name or "." in name or "/" in name or "\\" in name or hasattr(nn.ModuleDict, name) or name == BASE:
        raise UsageError(f"adapter_name: '{name}' cannot be used; take letters, digits, '_' or '-'")


def attach(model: Any, state: State, name: str, places: list[Place], method: type[Adapter], config: Any) -> None:
    """Attach an adapter at all `places`. Everything is built before the first module changes.

    Raises:
        UsageError: the name cannot be used or is taken.
        TargetError: a place cannot take its adapter.
    """
    check_adapter_name(name)
    if name in state.configs:
        raise UsageError(f"adapter_name: there is an adapter '{name}' already; delete it first or take another name")
    shared = method.share(model, config, [place.path for place in places])
    built: list[tuple[Any, Adapter]] = []
    problems: list[str] = []
    by_path: dict[str, Adapter] = {}
    for place in places:
        module = model.get_submodule(place.path)
        if not isinstance(module, Adapted) and hasattr(module, "adapters"):
            raise TargetError(f"{place.path}: the module has an attribute 'adapters' of its own")
        if getattr(module, "_merged", None):
            raise UsageError(f"{place.path}: adapters are merged into this module; unmerge them first")
        try:
            if place.mirrors is None:
                adapter = place.adapter(module, place.config, shared)
            elif place.mirrors in by_path:
                adapter = Mirror(module, by_path[place.mirrors])
            else:
                continue  # what is wrong with its owner is told already
        except TargetError as error:
            problems.append(f"{place.path}: {error}")
            continue
        by_path[place.path] = adapter
        built.append((module, adapter))
    raise_all(TargetError, problems)
    for module, adapter in built:
        _adapt(module, state).adapters[name] = adapter.train(module.training)
    state.configs[name] = config


def _adapt(module: Any, state: State) -> Any:
    if not isinstance(module, Adapted):
        instance_forward = module.__dict__.pop("forward", None)
        module.__class__ = class_with(Adapted, type(module))
        if instance_forward is not None:
            module.__dict__["_inner_forward"] = instance_forward
        module.adapters = nn.ModuleDict()
        module.__dict__.update(_state=state, _merged=[], _replaced={})
    return module


def detach(model: Any, state: State, name: str) -> None:
    """Take an adapter off every module; a module without adapters is what it was before."""
    for _, module in list(adapted_modules(model)):
        if name in module.adapters:
            del module.adapters[name]
        if not len(module.adapters):
            _restore(module)
    state.configs.pop(name, None)
    state.active = [active for active in state.active if active != name]


def _restore(module: Any) -> None:
    inner, outer = module.__dict__.pop("_inner_forward", None), module.__dict__.pop("_outer_forward", None)
    del module.adapters
    for attribute in ("_state", "_merged", "_replaced"):
        del module.__dict__[attribute]
    module.__class__ = class_without(type(module), Adapted)
    original = type(module).forward
    if outer is not None and "_old_forward" in module.__dict__:
        # accelerate's hook came after the adapters and calls `_old_forward`: from now on the bare module's.
        module.__dict__["_old_forward"] = functools.partial(original, module) if inner is None else inner
        module.__dict__["forward"] = outer
    elif inner is not None and getattr(inner, "__func__", None) is not original:
        module.__dict__["forward"] = inner


# --- merging ----------------------------------------------------------------------------------------------------


def merge(model: Any, names: list[str]) -> None:
    """Fold the adapters `names` into the weights, in fp32 and cast once. The replaced tensors are kept.

    Modules that shared one weight share one again where the merged weights are equal.

    Raises:
        MergeError: a method cannot be merged, or a merged tensor is not finite; the model is as before.
    """
    changed: list[Any] = []
    merged_once: dict[int, list[nn.Parameter]] = {}
    try:
        for path, module in adapted_modules(model):
            fresh = [name for name in names if name in module.adapters and name not in module._merged]
            if not fresh:
                continue
            changed.append(module)
            _merge_module(path, module, fresh, merged_once)
    except MergeError:
        for module in changed:
            _unmerge_module(module)
        raise


@torch.no_grad()
def _merge_module(path: str, module: Any, names: list[str], merged_once: dict[int, list[nn.Parameter]]) -> None:
    before = fold(module, [])
    try:
        after = fold_in_float32(module, names)
    except MergeError as error:
        raise MergeError(f"{path}: {error}") from error
    for name, tensor in after.items():
        if tensor is before.get(name):
            continue
        if not torch.isfinite(tensor).all():
            raise MergeError(f"{path}.{name}: the merged tensor has values that are not finite; nothing was merged")
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        old = holder._parameters.get(leaf, holder._buffers.get(leaf))  # None for a weight that is stored otherwise
        tensor = tensor.to(before[name].dtype).contiguous()
        module._replaced.setdefault(name, old)
        if leaf in holder._buffers:
            holder._buffers[leaf] = tensor
            continue
        twins = merged_once.setdefault(id(holder if old is None else old), [])
        new = next((twin for twin in twins if torch.equal(twin, tensor)), None)
        if new is None:
            new = nn.Parameter(tensor, requires_grad=before[name].requires_grad)
            twins.append(new)
        holder._parameters[leaf] = new
    module._merged.extend(names)


def fold_in_float32(module: Any, names: list[str]) -> dict[str, Tensor]:
    """As `fold`, with 16-bit tensors taken to fp32 first, so that the sum is rounded once."""
    original = fold(module, [])
    tensors = {
        name: tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
        for name, tensor in original.items()
    }
    wide = dict(tensors)
    for name in names:
        tensors = module.adapters[name].merged(tensors)
    return {name: original[name] if name in wide and t is wide[name] else t for name, t in tensors.items()}


@torch.no_grad()
def weight_changes(model: Any) -> Iterator[tuple[str, float]]:
    """||dW|| / ||W|| of every weight that the model's adapters act on, with the path of its module."""
    for path, module in adapted_modules(model):
        before, after = (fold_in_float32(module, names) for names in ([], list(module.adapters)))
        if "weight" in before:
            change = (after["weight"].float() - before["weight"].float()).norm()
            yield path, (change / before["weight"].float().norm().clamp_min(1e-12)).item()


def unmerge(model: Any) -> None:
    """Put back every tensor that merging replaced: exact to the bit."""
    for _, module in adapted_modules(model):
        _unmerge_module(module)


def _unmerge_module(module: Any) -> None:
    _swap(module, module._replaced)
    module._replaced.clear()
    module._merged.clear()


def merged_names(model: Any) -> list[str]:
    """The adapters that are merged into the weights now."""
    return list(dict.fromkeys(name for _, module in adapted_modules(model) for name in module._merged))


@contextmanager
def switched_off(model: Any, state: State) -> Iterator[None]:
    """The base model's own answers, to the bit, inside the block; merged adapters are taken out and put back."""
    enabled = state.enabled
    swapped: list[tuple[Any, dict[str, Any]]] = []
    for _, module in adapted_modules(model):
        if module._replaced:
            swapped.append((module, _swap(module, module._replaced)))
    state.enabled = False
    try:
        yield
    finally:
        state.enabled = enabled
        for module, tensors in swapped:
            _swap(module, tensors)


def _swap(module: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Put `tensors` into the module by name; answer what was there."""
    there = {}
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        holder = module.get_submodule(owner)
        table = holder._parameters if leaf in holder._parameters else holder._buffers
        there[name], table[leaf] = table[leaf], tensor
    return there
