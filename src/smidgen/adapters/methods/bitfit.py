"""BitFit: the biases of the model are trained, all else stays (https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from smidgen.adapters.config import TargetConfig
from smidgen.adapters.trained import CopyMethod, bias_names


@dataclass(kw_only=True)
class BitFitConfig(TargetConfig):
    """The configuration of BitFit; where `target_modules` is None, every bias is trained."""

    peft_type: ClassVar[str] = "BITFIT"
    files: ClassVar[str] = "smidgen"


class BitFit(CopyMethod):
    """Each target module computes with trained copies of its biases."""

    config_class = BitFitConfig
    otherwise = "it has no biases: take ln_tuning or ia3, which are as small"

    @classmethod
    def candidates(cls, model: nn.Module) -> dict[str, list[str]]:
        return dict(bias_names(model))
