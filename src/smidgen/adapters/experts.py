"""LoRA of single parameters: the experts of a mixture, which a module keeps as one stack, and routers.

Files are Hugging Face's: `lora_A` (E R, in) holds the experts one after the other, `lora_B` (out, R E) has the expert
as its fastest index. Keys name the module, not the parameter: of the adapted parameters of one module, in its order,
the last stands at ``<module>.``, the one before at ``<module>.base_layer.``, and so on.

Legend: E experts, R rank; a stack is (E, out, in), or (E, in, out) where the module says `is_transposed`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters.attach import adapters_of
from smidgen.adapters.base import Adapter, Inner
from smidgen.adapters.init import Start
from smidgen.adapters.layers import Factor
from smidgen.adapters.targets import short_name, stacks


def untouched(model: nn.Module, names: list[str]) -> str | None:
    """A line that says which experts the adapters `names` leave as they are; None where they leave none."""
    paths = stacks(model)
    adapted = {
        f"{path}.{own}"
        for name in names
        for path, adapter in adapters_of(model, name)
        if isinstance(adapter, ParameterLora)
        for own, _ in adapter.named_children()
    }
    left = Counter(short_name(path) for path in paths if path not in adapted)
    if not left:
        return None
    what = "not adapted" if len(paths) == left.total() else "adapted in part; not"
    told = ", ".join(f"{ending} x{count}" for ending, count in left.items())
    return f"experts: {what} ({told}); target_parameters adapts them"


class StackFactors(nn.Module):
    """A and B for one parameter, in the layout of the file; every expert starts by itself."""

    def __init__(self, parameter: Tensor, transposed: bool, place: Any):
        super().__init__()
        sides = parameter.shape[-2:]
        self.transposed = transposed and parameter.dim() == 3
        self.experts = parameter.shape[0] if parameter.dim() == 3 else 1
        self.flat, self.scaling = parameter.dim() == 2, place.scaling
        shape = (sides[1], sides[0]) if self.transposed else (sides[0], sides[1])
        start = Start(shape, parameter.device, parameter.float)  # of one expert; none reads the weight
        starts = [place.config.start(start, place, False) for _ in range(self.experts)]
        self.lora_A = Factor(torch.cat([a for a, _, _ in starts]))
        self.lora_B = Factor(torch.stack([b for _, b, _ in starts], dim=-1).flatten(1))

    def update(self) -> Tensor:
        """s B A of every expert, in the parameter's own layout."""
        a = self.lora_A.weight.unflatten(0, (self.experts, -1))  # (E, R, in)
        b = self.lora_B.weight.unflatten(1, (-1, self.experts)).permute(2, 0, 1)  # (E, out, R)
        update = torch.bmm(self.scaling * b, a)
        update = update.mT if self.transposed else update
        return update[0] if self.flat else update


class ParameterLora(Adapter):
    """W + s B A for single parameters of one module, each expert its own; the module then answers as it does.

    The configuration of its place says for each parameter, by name, what `LoraPlace` says for a layer.
    """

    # A token's expert is chosen before this module, and its rows are tokens of the whole batch.
    per_row = False

    def __init__(self, base: Any, config: dict[str, Any], shared: Any = None):
        super().__init__(base, config, shared)
        transposed = bool(getattr(base, "is_transposed", False))
        for name, place in config.items():
            self.add_module(name, StackFactors(base.get_parameter(name), transposed, place))

    def _stacks(self) -> Iterator[tuple[str, Any]]:
        return self.named_children()

    def forward(self, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        updated = self.merged(inner.tensors())
        return inner.call_with({name: updated[name] for name, _ in self._stacks()}, *args, **kwargs)

    def merged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {
            name: tensors[name] + stack.update().to(tensors[name].dtype) for name, stack in self._stacks()
        }

    def file_key(self, path: str, name: str) -> str:
        owner, _, rest = name.partition(".")
        below = list(dict(self._stacks())).index(owner) + 1
        return super().file_key(path, "base_layer." * (len(self._modules) - below) + rest)


def check_options(config: Any, found: dict[str, list[str]], targets: list[str]) -> list[str]:
    """A line for each option of LoRA that has no meaning for parameters, and for each place that is asked for twice."""
    lines = [f"target_parameters: '{path}' is a target module too; name it once" for path in found if path in targets]
    refused = {"lora_dropout": 0, "lora_bias": False, "use_dora": False, "layers_to_transform": None}
    lines += [
        f"{name}: not together with target_parameters, whose update is a part of the weight"
        for name, off in refused.items()
        if getattr(config, name) != off
    ]
    return lines
