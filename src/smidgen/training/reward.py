"""Objectives of reward models: one score for an answer, from pairs; one for each step of a solution.

Letters: B pairs, S steps of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smidgen.data.packing import IGNORED, Batch, batch_of
from smidgen.data.preference_rows import PairRows
from smidgen.data.task_rows import TaskBatch
from smidgen.losses.preference import reward_metrics
from smidgen.losses.reward import bradley_terry, step_rewards
from smidgen.models.rewards import answer_scores, check_head, token_scores
from smidgen.recipe import Recipe
from smidgen.training.objectives import Collating, Labelled, Losses, Objective
from smidgen.training.preference import pair_groups


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(Batch):
    """Pairs, the chosen row first; `rows` are the indices of the pairs. margins: (B,) float32."""

    margins: Tensor


class Reward(Objective):
    """The chosen answer's score is to be the higher one: Bradley and Terry's model of preferences."""

    metrics = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    def __init__(self, centering: float = 0.0) -> None:
        self.centering = centering

    @classmethod
    def of(cls, recipe: Recipe) -> Reward:
        return cls(recipe.reward.center_rewards_coefficient)

    def begin(self, model: Any, as_base: bool) -> None:
        check_head(model)

    def collate(self, rows: PairRows, update: Sequence[int], how: Collating) -> list[ScoredPairs]:
        batches = []
        for group, both in pair_groups(rows, update, how.token_budget, packing=False):
            batch = batch_of([rows.rows[index] for index in both], group, packing=False, pad_id=how.pad_id)
            margins = torch.from_numpy(rows.margins[np.array(group)]).float()
            batches.append(ScoredPairs(**vars(batch), margins=margins))
        return batches

    def count(self, batch: ScoredPairs) -> int:
        return len(batch.rows)

    def loss(self, model: Any, batch: ScoredPairs) -> Losses:
        scores = answer_scores(model, batch)
        chosen, rejected = scores[::2], scores[1::2]
        values = bradley_terry(chosen, rejected, margin=batch.margins, centering=self.centering)
        metrics = reward_metrics(chosen.detach(), rejected.detach())
        return Losses(values, torch.tensor(batch.rows, device=values.device), metrics)


class ProcessReward(Labelled):
    """The score at the end of each step is the logit that the step is right. https://arxiv.org/abs/2305.20050"""

    metrics = ("rewards/accuracies",)  # of steps

    def __init__(self) -> None:
        super().__init__("process_reward")

    @classmethod
    def of(cls, recipe: Recipe) -> ProcessReward:
        return cls()

    def begin(self, model: Any, as_base: bool) -> None:
        check_head(model)

    def loss(self, model: Any, batch: TaskBatch) -> Losses:
        there = batch.labels != IGNORED
        scores, labels = token_scores(model, batch)[there], batch.labels[there]
        rows = torch.tensor(batch.rows, device=labels.device)[:, None].expand_as(batch.labels)[there]
        right = ((scores.detach() > 0) == (labels > 0)).float()
        return Losses(step_rewards(scores, labels), rows, {"rewards/accuracies": right})
