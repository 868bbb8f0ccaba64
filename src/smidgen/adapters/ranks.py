"""The budget of ranks that the updates of AdaLoRA share (https://arxiv.org/abs/2303.10512, section 3).

Legend: R rank; a triplet is one singular value with its row of A (R, in) and column of B (out, R).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import UsageError

_STATISTICS = ("sensitivity", "uncertainty")


def schedule_problems(config: Any) -> list[str]:
    """A line for each number of a schedule that cannot be."""
    betas = {"beta1": config.beta1, "beta2": config.beta2}
    problems = [f"{name}: must be above 0 and below 1, got {beta}" for name, beta in betas.items() if not 0 < beta < 1]
    if not 1 <= config.target_r <= config.init_r <= 65_536:
        problems.append(f"target_r: must be from 1 to init_r {config.init_r}, got {config.target_r}")
    if min(config.tinit, config.tfinal, config.deltaT - 1) < 0:
        problems.append("tinit, tfinal, deltaT: must not be below 0, 0 and 1")
    if config.orth_reg_weight < 0:
        problems.append(f"orth_reg_weight: must not be below 0, got {config.orth_reg_weight}")
    return problems


def _numbers(place: Any) -> tuple[nn.Parameter, ...]:
    return place.lora_A, place.lora_E, place.lora_B


class RankBudget:
    """Takes the least important triplets of all places away while the model is trained.

    The importance of a number is the running mean of its sensitivity |w dL/dw| times that of the sensitivity's
    uncertainty; a triplet's is that of its singular value plus the means over its row and its column.
    """

    def __init__(self, config: Any):
        self.config = config
        self.places: dict[str, Any] = {}  # name in `rank_pattern`: the adapter

    def begin(self, total: int, optimizer: Any) -> None:
        """Learn how many updates there will be.

        Raises:
            UsageError: the schedule leaves none to allocate ranks in, or the training cannot follow it.
        """
        config = self.config
        config.total_step = config.total_step or total
        if not self._follows():
            return
        if config.tinit >= config.total_step - config.tfinal:
            raise UsageError(
                f"tinit {config.tinit} and tfinal {config.tfinal} leave none of {config.total_step} updates "
                "to allocate ranks in: make them smaller, or train longer"
            )
        if not hasattr(optimizer, "state") or any(
            hasattr(place.lora_E, "full_tensor") for place in self.places.values()
        ):
            raise UsageError("adalora sees whole gradients: train it without DeepSpeed and FSDP, or take lora")

    def _follows(self) -> bool:
        """Whether ranks are allocated at all: not where the adapter is frozen, or was loaded with its ranks settled."""
        settled = self.config.rank_pattern is not None and all(place.kept is None for place in self.places.values())
        return not settled and any(place.lora_E.requires_grad for place in self.places.values())

    def statistics(self) -> dict[nn.Parameter, tuple[str, ...]]:
        """What `after_step` keeps of each parameter: float32 tensors of its shape, by name."""
        followed = self.places.values() if self._follows() else ()
        return {parameter: _STATISTICS for place in followed for parameter in _numbers(place)}

    @torch.no_grad()
    def after_step(self, step: int, statistics: Mapping[nn.Parameter, dict[str, Any]]) -> None:
        """Follow update `step` (the first is 1), whose gradients are still there.

        Args:
            statistics: what the optimizer keeps of each parameter; the running means are kept there too.
        """
        if not self._follows():
            return
        config = self.config
        final = config.total_step - config.tfinal
        if step < final:
            for place in self.places.values():
                for parameter in _numbers(place):
                    self._follow(parameter, statistics[parameter])
            if step > config.tinit and step % config.deltaT == 0:
                self._allocate(self._budget(step), statistics)
            return
        if any(place.kept is None for place in self.places.values()):  # also after an interruption: to the same end
            for name, kept in self._allocate(self._budget(final), statistics).items():
                self.places[name].kept = kept
        for name, place in self.places.items():
            place.lora_E[~place.kept] = 0
            config.rank_pattern = (config.rank_pattern or {}) | {name: place.kept.tolist()}

    def _budget(self, step: int) -> int:
        """How many triplets are left after `step`: it falls as a cube."""
        config, places = self.config, len(self.places)
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((config.init_r - config.target_r) * places * left**3 + config.target_r * places)

    def _follow(self, parameter: nn.Parameter, statistics: dict[str, Any]) -> None:
        if parameter.grad is None:
            return
        sensitivity, zeros = (parameter * parameter.grad).abs(), torch.zeros_like(parameter)
        mean = torch.lerp(sensitivity, statistics.get("sensitivity", zeros), self.config.beta1)
        away = (sensitivity - mean).abs()
        uncertainty = torch.lerp(away, statistics.get("uncertainty", zeros), self.config.beta2)
        statistics |= zip(_STATISTICS, (mean, uncertainty), strict=True)

    def _allocate(self, budget: int, statistics: Mapping[nn.Parameter, dict[str, Any]]) -> dict[str, Tensor]:
        """Leave the `budget` most important triplets of all; answer which of each place are left."""

        def scores(parameter: nn.Parameter) -> Tensor:
            return statistics[parameter]["sensitivity"] * statistics[parameter]["uncertainty"]

        importance = {
            name: scores(place.lora_E).flatten() + scores(place.lora_A).mean(1) + scores(place.lora_B).mean(0)
            for name, place in self.places.items()
        }
        together = torch.cat([*importance.values()])
        surplus = len(together) - budget
        threshold = together.kthvalue(surplus).values if surplus > 0 else -1.0
        kept = {name: important > threshold for name, important in importance.items()}
        for name, place in self.places.items():
            place.lora_E[~kept[name]] = 0
        return kept
