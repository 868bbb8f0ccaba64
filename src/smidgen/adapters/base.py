"""What an adapter is: a small module that stands around the call of one module of a frozen model.

What lies below it, the base layer or other adapters and then the base layer, is handed in as `inner`. If the method
is a function of the weight it says which: `merge`. That is all a method has to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from smidgen.adapters.config import PeftConfig
from smidgen.adapters.layers import Layer, layer_of
from smidgen.errors import MergeError, TargetError
from smidgen.kernels.dequantize import Packed
from smidgen.kernels.lora import LowRank


class Inner(Protocol):
    """What lies below an adapter during one call."""

    module: Any  # the module that the adapter stands around
    layer: Layer

    @property
    def group(self) -> Any:
        """What tells the rows of this call from other rows of the batch, which other adapters answer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer the call as the base layer and the adapters below would."""

    def tensors(self) -> dict[str, Tensor]:
        """The effective parameters and buffers of the module, by name."""
        ...

    @property
    def weight(self) -> Tensor:
        """The effective weight: the base layer's with the adapters below folded in."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """The effective bias."""

    @property
    def plain_weight(self) -> Tensor | Packed | None:
        """The weight as it is kept, if nothing but a plain product is below: then one operation may stand for all."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The base layer's own computation with another weight and bias."""
        ...

    def call_with(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Answer the call as the base module would with `tensors` in place of its own, by name."""


@dataclass(frozen=True)
class Place:
    """One module that gets an adapter: its path, the adapter's class, and the configuration of that place."""

    path: str
    adapter: type[Adapter]
    config: Any
    mirrors: str | None = None  # the path of the adapted layer whose weight is tied to this one's


class Adapter(nn.Module):
    """Stands around the call of one module. Parameters carry the names of the Hugging Face adapter file."""

    config_class: ClassVar[type[PeftConfig]]
    # Whether the answer to a row depends on that row alone, so that each row of a batch may have its own adapter.
    per_row: ClassVar[bool] = True
    # What it adds to each call while it is not merged: "none", "small", "large" (as much as the weight) or "prompt".
    latency: ClassVar[str] = "small"

    @classmethod
    def plan(cls, model: nn.Module, config: Any) -> Iterator[Place]:
        """Yield every place that gets an adapter. All targets and patterns are resolved here, and only here.

        Raises:
            TargetError: a requested module is not in the model, or cannot be adapted.
        """
        raise NotImplementedError

    @classmethod
    def share(cls, model: nn.Module, config: Any, paths: list[str]) -> Any:
        """Make what all places of one adapter hold together; None where they share nothing."""
        return None

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__()

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        """Answer the call; ``inner(...)`` runs what lies below."""
        raise NotImplementedError

    def added(self, inner: Inner, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """What this adapter reads, and what it adds to the answer `y` of what lies below; `forward` in two parts."""
        return y, self(inner, x) - y

    def is_low_rank(self) -> bool:
        """Whether the answer is that of a linear layer below plus `low_rank`, with nothing else."""
        return False

    def low_rank(self) -> LowRank:
        """The update of one call, with the mask of its dropout; only where `is_low_rank`."""
        raise NotImplementedError

    def is_idle(self) -> bool:
        """Whether the adapter is meant to change nothing at this place: what it shares with others was spent there."""
        return False

    @classmethod
    def is_mergeable(cls) -> bool:
        """Whether the adapter is a function of the module's tensors."""
        return cls.merged is not Adapter.merged

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's tensors by name with this adapter folded in.

        Raises:
            MergeError: no tensors of the module answer as this adapter does.
        """
        raise MergeError(f"{type(self).__name__} changes more than weights: it cannot be merged")

    def penalty(self) -> Tensor | None:
        """A term for the loss, summed over all adapters by the training loop; None where there is none."""
        return None

    def file_key(self, path: str, name: str) -> str:
        """The key of parameter `name` of the adapter at `path` in the adapter file."""
        return f"base_model.model.{path}.{name}"

    def repeated(self, path: str) -> dict[str, str]:
        """Keys under which other tools' files hold a tensor once more, each with the key that it repeats."""
        return {}

    def unfit(self, tensors: dict[str, Any]) -> list[str]:
        """A line for each tensor of a file, by parameter name, whose values cannot be; names and shapes are right."""
        return []

    def file_tensors(self) -> dict[str, Tensor]:
        """What is saved, by parameter name."""
        return dict(self.named_parameters()) | {
            name: buffer for name, buffer in self.named_buffers() if name not in self._unsaved_buffers()
        }

    def fit_file(self, keys: Set[str]) -> None:
        """Before a file with these keys is loaded: take the form that it holds, where a method has several."""

    def _unsaved_buffers(self) -> set[str]:
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name in module._non_persistent_buffers_set
        }


class WeightAdapter(Adapter):
    """An adapter that is a function of the weight. `merge` defines it; `forward` may be a cheaper equal."""

    def __init__(self, base: Any, config: Any, shared: Any = None):
        super().__init__(base, config, shared)
        layer = layer_of(base)
        if layer is None:
            raise TargetError(f"{type(self).__name__} cannot stand around a {type(base).__name__}")
        # The layer is kept out of the module tree: it belongs to the base model, not to the adapter.
        self.__dict__["layer"] = layer

    layer: Layer

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias that answer as this adapter does, in the layer's own layout."""
        raise NotImplementedError

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        return inner.apply(x, *self.merge(inner.weight, inner.bias))

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        weight, bias = self.merge(tensors["weight"], tensors.get("bias"))
        if bias is not None and "bias" not in tensors:
            raise MergeError("the adapter has a bias and the layer has none to merge it into")
        return tensors | {"weight": weight} | ({} if bias is None else {"bias": bias})


class OnModel(Adapter):
    """Stands around the whole model's call: prompts, prefixes, routers."""

    per_row = False
    latency = "prompt"
    # Adapters of one family answer a batch together in which each row has its own; the others of it have none.
    family: ClassVar[str] = ""

    @classmethod
    def answer_rows(cls, inner: Inner, adapters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        """Answer a call with one of `adapters`, or None, for each row; only where `per_row`."""
        raise NotImplementedError

    @classmethod
    def plan(cls, model: nn.Module, config: Any) -> Iterator[Place]:
        yield Place("", cls, config)

    def file_key(self, path: str, name: str) -> str:
        return name


def in_adapter(name: str, adapter: str = "") -> bool:
    """Whether the parameter or buffer called `name` belongs to an adapter (this one) and not to the base model."""
    return f".adapters.{adapter}{'.' * bool(adapter)}" in f".{name}"


def base_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The model's own modules by path, without those of attached adapters."""
    skipped: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in skipped:
            continue
        adapters = module._modules.get("adapters")
        if getattr(module, "is_adapted", False) and adapters is not None:
            skipped.update(adapters.modules())
        yield path, module
