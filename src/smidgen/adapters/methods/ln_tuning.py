"""LN tuning: the norms of the model are trained, all else stays (https://arxiv.org/abs/2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smidgen.adapters.base import base_modules, in_adapter
from smidgen.adapters.config import TargetConfig
from smidgen.adapters.trained import CopyMethod


@dataclass(kw_only=True)
class LNTuningConfig(TargetConfig):
    """The configuration of LN tuning; where `target_modules` is None, every norm is trained."""

    peft_type: ClassVar[str] = "LN_TUNING"
    beyond_format: ClassVar[frozenset[str]] = frozenset({"layers_to_transform", "layers_pattern", "fan_in_fan_out"})


class LNTuning(CopyMethod):
    """Each target module computes with trained copies of its own parameters."""

    config_class = LNTuningConfig
    otherwise = "name the target_modules"

    @classmethod
    def candidates(cls, model: nn.Module) -> dict[str, list[str]]:
        owned = {
            path: [name for name, _ in module.named_parameters() if not in_adapter(name)]
            for path, module in base_modules(model)
            if path
        }
        return {path: names for path, names in owned.items() if names}

    @classmethod
    def suits(cls, module: nn.Module) -> bool:
        """A norm: a module by that name whose own parameters are vectors."""
        dimensions = {parameter.dim() for parameter in module.parameters(recurse=False)}
        return "norm" in type(module).__name__.lower() and dimensions == {1}

    def file_key(self, path: str, name: str) -> str:
        return super().file_key(path, f"ln_tuning_layers.{name}")
