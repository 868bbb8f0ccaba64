"""Full and freeze tuning: parameters of the base model itself are trained, all of them or those of the last layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from smidgen.errors import TargetError, did_you_mean, raise_all


@dataclass
class FullConfig:
    """Full tuning has nothing to configure."""


@dataclass
class FreezeConfig:
    """What freeze tuning trains.

    Args:
        num_layers: how many layers, counted from the last.
        modules: names of modules that are trained too, as a path ends: ``norm``, ``lm_head``.
    """

    num_layers: int = 2
    modules: list[str] = field(default_factory=list)


class Full:
    """Every parameter is trained."""

    config_class: ClassVar[type] = FullConfig

    @classmethod
    def select(cls, model: nn.Module, config: FullConfig) -> list[str]:
        """The names of the parameters to train; a tied one once."""
        return [name for name, _ in model.named_parameters()]


class Freeze:
    """The last layers are trained, the rest stays as it is."""

    config_class: ClassVar[type] = FreezeConfig

    @classmethod
    def select(cls, model: nn.Module, config: FreezeConfig) -> list[str]:
        """The names of the parameters to train; a tied one once.

        Raises:
            TargetError: there are not so many layers, or no module has a name that was asked for.
        """
        path, count = layer_list(model) if config.num_layers else ("", 0)
        paths = [name for name, _ in model.named_modules() if name]
        problems = []
        if not 0 <= config.num_layers <= count:
            problems.append(f"num_layers: {config.num_layers} asked for, '{path}' has {count} layers")
        chosen = [f"{path}.{index}" for index in range(count - config.num_layers, count)]
        for wanted in config.modules:
            found = [name for name in paths if name == wanted or name.endswith(f".{wanted}")]
            chosen += found
            if not found:
                near = did_you_mean(wanted, {name.rpartition(".")[2] for name in paths})
                problems.append(f"modules: no module is called '{wanted}'{near}")
        raise_all(TargetError, problems)
        tensors = dict(model.named_parameters(remove_duplicate=False))
        wanted_ids = {id(t) for name, t in tensors.items() if any(name.startswith(f"{start}.") for start in chosen)}
        return [name for name, parameter in model.named_parameters() if id(parameter) in wanted_ids]


def layer_list(model: nn.Module) -> tuple[str, int]:
    """The path and the length of the model's stack of layers: the longest ModuleList that is not inside another one.

    Raises:
        TargetError: the model has no ModuleList.
    """
    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: n for name, n in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise TargetError(
            f"{type(model).__name__} has no list of layers; name the 'modules' to train with num_layers: 0"
        )
    return max(outer.items(), key=lambda item: item[1])
