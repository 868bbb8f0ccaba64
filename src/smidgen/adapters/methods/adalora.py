"""AdaLoRA: updates in the form of a singular value decomposition, and one budget of ranks for all of them
(https://arxiv.org/abs/2303.10512).

Legend: R rank; a triplet is one singular value with its row of A (R, in) and column of B (out, R).
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smidgen.adapters.base import Inner, Place, WeightAdapter
from smidgen.adapters.config import TargetConfig, fraction
from smidgen.adapters.layers import EmbeddingLayer
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.adapters.ranks import RankBudget, schedule_problems
from smidgen.adapters.targets import find_targets
from smidgen.adapters.trained import plan_trained
from smidgen.errors import TargetError
from smidgen.kernels.lora import LowRank, as_one, lora_linear

_SPREAD = 0.02  # of A and B at the start


@dataclass(kw_only=True)
class AdaLoraConfig(TargetConfig):
    """The configuration of AdaLoRA. Names and meanings are those of Hugging Face adapter files.

    Args:
        init_r, target_r: the rank of every update at the start, and the mean one at the end.
        tinit, tfinal: updates at the start and at the end in which ranks stay; deltaT: those between two allocations.
        total_step: updates in all; None: what the training loop will make.
        beta1, beta2: how slowly the averages of sensitivity and of its uncertainty follow.
        orth_reg_weight: of the penalty that keeps A's rows, and B's columns, orthonormal.
        rank_pattern: which triplets of each update are left; written at the end of an allocation.
        r: there for files; `init_r` counts. The rest is as for LoRA, but the scale is lora_alpha / init_r.
    """

    peft_type: ClassVar[str] = "ADALORA"
    refused: ClassVar[dict[str, Any]] = LoraConfig.refused | {"bias": "none", "init_lora_weights": True}
    refused |= dict.fromkeys(("alpha_pattern", "ensure_weight_tying", "lora_bias", "use_dora", "use_rslora"), False)
    refused |= dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config"))
    refused |= dict.fromkeys(("target_parameters", "trainable_token_indices"))

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    total_step: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_pattern: dict[str, list[bool]] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0

    def problems(self) -> list[str]:
        return [*super().problems(), *schedule_problems(self), *fraction("lora_dropout", self.lora_dropout)]


class AdaLora(WeightAdapter):
    """y = x W^T + s B diag(E) A dropout(x), s = lora_alpha / init_r; a place is told its name in `rank_pattern`."""

    config_class = AdaLoraConfig
    budget: RankBudget

    @classmethod
    def plan(cls, model: nn.Module, config: AdaLoraConfig) -> Iterator[Place]:
        targets = find_targets(model, config)
        if config.rank_pattern is not None and config.rank_pattern.keys() != {f"{path}.lora_E" for path in targets}:
            raise TargetError("rank_pattern: names other modules than those that are adapted: another base or targets")
        yield from (Place(path, cls, (config, f"{path}.lora_E")) for path in targets)
        yield from plan_trained(model, config, targets)

    @classmethod
    def share(cls, model: nn.Module, config: AdaLoraConfig, paths: list[str]) -> RankBudget:
        return RankBudget(config)

    def __init__(self, base: Any, config: tuple[AdaLoraConfig, str], shared: Any = None):
        super().__init__(base, config)
        options, name = config
        if isinstance(self.layer, EmbeddingLayer) or getattr(base, "groups", 1) > 1:
            raise TargetError(f"AdaLoRA cannot stand around a {type(base).__name__}, with groups or without: take lora")
        rank = options.init_r if options.rank_pattern is None else sum(options.rank_pattern[name])
        (outputs, inputs), device = self.layer.shape, self.layer.device
        self.lora_A = nn.Parameter(torch.randn(rank, inputs, device=device) * _SPREAD)
        self.lora_E = nn.Parameter(torch.zeros(rank, 1, device=device))
        self.lora_B = nn.Parameter(torch.randn(outputs, rank, device=device) * _SPREAD)
        self.scaling = options.lora_alpha / (options.init_r + 1e-5)
        self.dropout = nn.Dropout(options.lora_dropout)
        self.kept: Tensor | None = None  # which triplets are left, once settled; the others answer nothing
        self.__dict__["budget"] = shared
        shared.places[name] = self

    def factors(self) -> tuple[Tensor, Tensor]:
        """diag(E) A (R, in) and B (out, R)."""
        return self.lora_E * self.lora_A, self.lora_B

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = self.factors()
        return weight + self.layer.store(self.scaling * (b @ a)), bias

    def forward(self, inner: Inner, x: Tensor) -> Tensor:
        if (weight := inner.plain_weight) is not None and self.is_low_rank() and as_one(x, weight):
            return lora_linear(x, weight, inner.bias, [self.low_rank()])
        y, (a, b) = inner(x), self.factors()
        hidden = self.layer.linear(self.dropout(x).to(y.dtype), a.to(y.dtype))
        return y + self.layer.pointwise(hidden, (self.scaling * b).to(y.dtype))

    def is_low_rank(self) -> bool:
        return not self.is_idle()

    def is_idle(self) -> bool:
        return not (torch.ones(len(self.lora_E)) if self.kept is None else self.kept).any()

    def low_rank(self) -> LowRank:
        return LowRank.drawn(*self.factors(), self.scaling, self.dropout)

    def penalty(self) -> Tensor | None:
        """orth_reg_weight times the mean over all A and B of ||A A^T - I|| and ||B^T B - I||."""
        weight = self.budget.config.orth_reg_weight / (2 * len(self.budget.places))
        if not weight or not self.lora_A.requires_grad:
            return None
        unit = torch.eye(len(self.lora_A), device=self.lora_A.device)
        return weight * sum((x @ x.T - unit).norm() for x in (self.lora_A, self.lora_B.T))

    def fit_file(self, keys: Set[str]) -> None:
        self.kept = None

    def file_tensors(self) -> dict[str, Tensor]:
        tensors = super().file_tensors()
        if self.kept is None:
            return tensors
        return {name: t[:, self.kept] if name == "lora_B" else t[self.kept] for name, t in tensors.items()}
