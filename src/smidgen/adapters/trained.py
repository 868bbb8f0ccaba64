"""Parts of the base model that are trained in full beside a method: whole modules, biases, rows of an embedding.

The base stays as it is: what is trained is a copy, so that switching the adapter off answers as the base does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Adapter, Inner, Place, WeightAdapter, base_modules, in_adapter
from smidgen.adapters.config import TASK_HEADS
from smidgen.adapters.layers import EmbeddingLayer, layer_of
from smidgen.adapters.targets import (
    ends_with,
    find_named,
    find_targets,
    is_bypassed,
    is_copied,
    language_half,
    names_of,
)
from smidgen.errors import TargetError
from smidgen.quant.linear import QuantizedLinear


class TrainedCopy(Adapter):
    """Trained copies, in fp32, of parameters of one module: all of them (`modules_to_save`) or its biases.

    The configuration of its place is the list of the parameters' names within the module.
    """

    latency = "none"

    def __init__(self, base: Any, config: list[str], shared: Any = None):
        super().__init__(base, config, shared)
        for name in config:
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(base.get_parameter(name).detach().float().clone())
            _submodule(self, owner).register_parameter(leaf, parameter)

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        return inner.call_with(dict(self.named_parameters()), *args, **kwargs)

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | dict(self.named_parameters())

    def mirror_tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())


class CopyMethod(TrainedCopy):
    """A method that trains copies of parameters at its target modules and nothing else."""

    otherwise: ClassVar[str]  # what to do where a model has nothing that the method trains

    @classmethod
    def candidates(cls, model: nn.Module) -> dict[str, list[str]]:
        """The modules that can be trained, by path, each with the names of its parameters."""
        raise NotImplementedError

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """Whether the method is meant for `module`: what `target_modules` is where the configuration does not say."""
        return True

    @classmethod
    def plan(cls, model: nn.Module, config: Any) -> Iterator[Place]:
        candidates = cls.candidates(model)
        modules = {model.get_submodule(path): names for path, names in candidates.items()}
        if config.target_modules is None:
            inside = [path for path in candidates if path.startswith(language_half(model))]
            inside = [path for path in inside if not is_copied(path, config)]
            meant = [path for path in inside if cls.suits(model.get_submodule(path))]
            if not meant:
                raise TargetError(f"{cls.__name__}: {type(model).__name__} has nothing that it trains; {cls.otherwise}")
            config.target_modules = names_of(model, meant)
        targets = find_targets(model, config, accepts=modules.__contains__)
        for path in targets:
            yield Place(path, cls, modules[model.get_submodule(path)])
        yield from plan_trained(model, config, targets)


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, made on the way where it is missing."""
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module._modules[name]  # type: ignore[assignment]
    return module


class TokenRows(WeightAdapter):
    """Trained rows of an embedding, or of the head that is tied to it, in place of the base's; other rows stay.

    `trainable_tokens_delta` (n, D) holds the rows themselves, under the name that Hugging Face's files give it. At a
    head only the logits of these tokens are computed anew.
    """

    field: ClassVar[str] = "trainable_token_indices"  # of the configuration
    indices: Tensor
    place: Tensor

    def __init__(self, base: Any, config: list[int], shared: Any = None):
        super().__init__(base, config, shared)
        count = base.weight.shape[0]
        wrong = [index for index in config if not 0 <= index < count]
        if wrong or not config:
            raise TargetError(f"{self.field}: {wrong or 'an empty list'}; the vocabulary has {count} rows")
        indices = torch.tensor(config, device=base.weight.device)
        self.register_buffer("indices", indices, persistent=False)
        # One place more than the largest index, for all tokens beyond it: the vocabulary may grow later.
        place = torch.full((max(config) + 2,), -1, device=base.weight.device)
        place[indices] = torch.arange(len(config), device=base.weight.device)
        self.register_buffer("place", place, persistent=False)
        self.trainable_tokens_delta = nn.Parameter(base.weight.detach()[indices].float())

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.index_copy(0, self.indices, self.trainable_tokens_delta.to(weight.dtype)), bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        layer, rows, y = inner.layer, self.trainable_tokens_delta, inner(x)
        if isinstance(layer, EmbeddingLayer):
            place = self.place[x.clamp(max=self.place.numel() - 1)]
            own = layer.linear(place.clamp(min=0), rows.to(y.dtype).T)
            return torch.where((place >= 0).unsqueeze(-1), own, y)
        bias = inner.bias
        own = layer.linear(x, rows.to(x.dtype), None if bias is None else bias[self.indices])
        return y.index_copy(-1, self.indices, own.to(y.dtype))

    def file_key(self, path: str, name: str) -> str:
        return super().file_key(path, f"token_adapter.{name}")


class Mirror(WeightAdapter):
    """Stands at a layer whose weight is tied to another's and answers with the weight that is adapted there."""

    owner: Any

    def __init__(self, base: Any, owner: Any):
        super().__init__(base, None)
        # Not a submodule: the owner's parameters are registered, trained and counted at its own place.
        self.__dict__["owner"] = owner

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.owner.merged({"weight": weight})["weight"], bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        return self.owner(inner, x) if isinstance(self.owner, TokenRows) else super().forward(inner, x)

    def file_tensors(self) -> dict[str, Tensor]:
        return self.owner.mirror_tensors() if hasattr(self.owner, "mirror_tensors") else {}


def plan_trained(model: nn.Module, config: Any, targets: list[str]) -> Iterator[Place]:
    """The places of what is trained in full beside the `targets` of a method.

    Reads `modules_to_save` (with the new heads of the task), `trainable_token_indices` and `bias`.

    Raises:
        TargetError: a name matches nothing.
    """
    heads = TASK_HEADS.get(config.task_type, ())  # other tools' files name them all, whichever the model has
    present = [path for path, _ in base_modules(model)]
    names = [name for name in config.modules_to_save or () if name not in heads]
    names += [head for head in heads if any(ends_with(path, head) for path in present)]
    copied = find_named(model, names, "modules_to_save", at_dot=False) if names else []
    for path in copied:
        own = [name for name, _ in model.get_submodule(path).named_parameters() if not in_adapter(name)]
        stored = [module for module in model.get_submodule(path).modules() if isinstance(module, QuantizedLinear)]
        if stored:
            raise TargetError(f"modules_to_save: '{path}' is stored in 4 or 8 bits; leave it out of the quantisation")
        if not own:
            raise TargetError(f"modules_to_save: '{path}' has no parameters")
        yield Place(path, TrainedCopy, own)
    yield from _plan_tokens(model, getattr(config, "trainable_token_indices", None), targets)
    if getattr(config, "bias", "none") == "all":
        for path, biases in bias_names(model):
            if path not in targets and not any(path == copy or path.startswith(f"{copy}.") for copy in copied):
                yield Place(path, TrainedCopy, biases)


def bias_names(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Every module that adds a bias: its path and the names of its biases.

    A layer that is never called, because its parent computes with its weight, counts as a part of the parent.
    """
    for path, module in base_modules(model):
        if not is_bypassed(model, path):
            parts = isinstance(module, nn.MultiheadAttention)
            names = [name for name, _ in module.named_parameters(recurse=parts) if not in_adapter(name)]
            if biases := [name for name in names if "bias" in f"{path}.{name}"]:
                yield path, biases


def _plan_tokens(model: Any, tokens: list[int] | dict[str, list[int]] | None, targets: list[str]) -> Iterator[Place]:
    if not tokens:
        return
    if isinstance(tokens, list):
        embedding = model.get_input_embeddings()
        tokens = {next(path for path, module in base_modules(model) if module is embedding): tokens}
    for name, indices in tokens.items():
        for path in find_named(model, [name], "trainable_token_indices"):
            if path in targets:
                raise TargetError(
                    f"trainable_token_indices: '{path}' is a target module too; train its rows or adapt it"
                )
            yield Place(path, TokenRows, list(indices))


def with_mirrors(model: nn.Module, places: list[Place], ensure_weight_tying: bool) -> list[Place]:
    """The `places`, with a mirror at each layer whose weight is tied to an adapted one's.

    Rows of tokens are mirrored always, other adapters where `ensure_weight_tying` asks for it; else the adapted layer
    answers alone, and merging unties it.
    """
    tied: dict[int, list[str]] = {}
    for path, module in base_modules(model):
        weight = module._parameters.get("weight")
        if weight is not None and layer_of(module) is not None:
            tied.setdefault(id(weight), []).append(path)
    by_path = {place.path: place for place in places}
    result: list[Place] = []
    for place in places:
        group = tied.get(id(model.get_submodule(place.path)._parameters.get("weight")), [place.path])
        mirrored = len(group) > 1 and (ensure_weight_tying or issubclass(place.adapter, TokenRows))
        if not mirrored:
            result.append(place)
            continue
        first, *others = group
        if place.path != first and first in by_path:
            continue  # one adapter for the whole group, at its first layer
        owner = replace(place, path=first)
        result += [owner, *(Place(other, Mirror, None, mirrors=first) for other in others)]
    return result
