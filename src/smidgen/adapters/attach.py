"""Attaching adapters in place: a module keeps its object, name and weights and gains a class in front of its own.

`torch.nn.utils.parametrize` does the same: the class becomes a subclass ``(Adapted, OriginalClass)`` made once. A
module's parameters keep their names; an adapter's stand at ``<module>.adapters.<adapter name>.<parameter>``.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.answering import Averaged, Below, answer_rows, fold, kept_weight, swap
from smidgen.adapters.base import Adapter, Place, base_modules
from smidgen.adapters.compose import Chain, links_of
from smidgen.adapters.trained import Mirror
from smidgen.errors import MergeError, TargetError, UsageError, raise_all
from smidgen.kernels.lora import Linear
from smidgen.quant.linear import QuantizedLinear

BASE = "__base__"  # the name that asks for no adapter at all, for a row of a batch


@dataclass
class State:
    """What the adapted modules of one model share: which adapters there are and which answer now."""

    configs: dict[str, Any] = field(default_factory=dict)
    active: list[str] = field(default_factory=list)
    enabled: bool = True
    branches: list[Chain] = field(default_factory=list)  # how they answer, for each copy of the rows; none: stacked
    rows: list[Chain] | None = None  # what answers each row of the batch of this call
    shared: dict[str, Any] = field(default_factory=dict)  # what all places of each adapter hold together

    @property
    def chain(self) -> Chain:
        """What answers at a module, lowest first."""
        if len(self.branches) > 1:
            raise UsageError("Parallel: is answered by a call of the model itself, not of a module in it")
        return self.branches[0] if self.branches else tuple(self.active)


# --- classes made once ------------------------------------------------------------------------------------------


@functools.cache
def class_with(mixin: type, original: type) -> type:
    """The subclass ``(mixin, original)`` that carries the original's name; made once for each pair."""
    namespace: dict[str, Any] = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    if mixin is Adapted:
        namespace["_answer"] = _with_signature_of(original.forward)
    made = type(original.__name__, (mixin, original), namespace)
    if "forward" in vars(made):  # some classes of transformers give each subclass a forward, which would hide ours
        del made.forward
    return made


def _with_signature_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`Adapted._answer`, showing the arguments of the forward that it stands for: some callers ask for them."""

    def answer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Adapted._answer(self, *args, **kwargs)

    answer.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return answer


def class_without(cls: type, mixin: type) -> type:
    """`cls` with `mixin` taken out, also from below classes that were put in front later (FSDP2 does so)."""
    if mixin not in cls.__mro__:
        return cls
    if cls.__bases__[0] is mixin:
        return cls.__bases__[1]
    bases = tuple(class_without(base, mixin) for base in cls.__bases__)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, bases, body)


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


class _Forward(property):
    """A property; asked of the class it is the forward that it stands before, whose arguments others look at."""

    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        if instance is not None or owner is None or owner is Adapted:
            return super().__get__(instance, owner)
        below = owner.__mro__[owner.__mro__.index(Adapted) + 1 :]
        return next(vars(base)["forward"] for base in below if "forward" in vars(base))


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

    @_Forward
    def forward(self) -> Callable[..., Any]:
        outer = self.__dict__.get("_outer_forward")
        return self._answer if outer is None else outer

    @forward.setter
    def forward(self, value: Callable[..., Any]) -> None:
        functions = list(_wrapped_functions(value))
        answer = type(self)._answer
        if functions[0] is answer:
            self.__dict__.pop("_outer_forward", None)
        elif answer in functions:
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
            return answer_rows(self, state.rows, args, kwargs)
        return Below(self, self._answering(state.chain))(*args, **kwargs)

    def _answering(self, chain: Iterable[Any]) -> Chain:
        """The links of a chain that stand here."""
        return tuple(
            link for link in chain if any(n in self.adapters and n not in self._merged for n in links_of((link,)))
        )

    def _adapter(self, link: Any) -> Any:
        """The adapter that a link of a chain names."""
        return self.adapters[link] if isinstance(link, str) else Averaged(self, link)


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


def _answering_adapters(module: Any) -> list[Any]:
    if not isinstance(module, Adapted) or not module._state.enabled:
        return []
    return [module._adapter(link) for link in module._answering(module._state.chain)]


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
    state.shared[name] = shared


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
    state.shared.pop(name, None)
    state.active = [active for active in state.active if active != name]
    if any(name in links_of(chain) for chain in state.branches):
        state.branches = []


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


def schedules(model: Any) -> list[Any]:
    """What the active adapters share that follows the training: ``begin(updates in all, optimizer)``, once, and
    ``after_step(update, the optimizer's state of each parameter)`` after each, with its gradients still there; it adds
    to that state what ``statistics()`` names for each parameter."""
    state = getattr(model, "_adapters", None)
    found = [state.shared[name] for name in state.active] if state else []
    return [shared for shared in found if hasattr(shared, "after_step")]


def penalties(model: nn.Module) -> list[Tensor]:
    """The terms that adapters add to the loss of an update."""
    adapters = (module for module in model.modules() if isinstance(module, Adapter))
    return [penalty for adapter in adapters if (penalty := adapter.penalty()) is not None]


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
        raise MergeError(f"{path or type(module).__name__}: {error}") from error
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
    for name in names:
        if not module.adapters[name].is_mergeable():
            module.adapters[name].merged({})  # refuses
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
        own = module.adapters.values()
        if not all(adapter.is_mergeable() for adapter in own) or all(adapter.is_idle() for adapter in own):
            continue
        before, after = (fold_in_float32(module, names) for names in ([], list(module.adapters)))
        names = ["weight"] if "weight" in before else [name for name in before if after[name] is not before[name]]
        for name in names:
            change = (after[name].float() - before[name].float()).norm()
            place = path if name == "weight" else f"{path}.{name}"
            yield place, (change / before[name].float().norm().clamp_min(1e-12)).item()


def unmerge(model: Any) -> None:
    """Put back every tensor that merging replaced: exact to the bit."""
    for _, module in adapted_modules(model):
        _unmerge_module(module)


def _unmerge_module(module: Any) -> None:
    swap(module, module._replaced)
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
            swapped.append((module, swap(module, module._replaced)))
    state.enabled = False
    try:
        yield
    finally:
        state.enabled = enabled
        for module, tensors in swapped:
            swap(module, tensors)
