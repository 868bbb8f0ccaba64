"""Objectives: what a batch is made of, what is computed before the gradient, and the values that become the loss.

The loop knows nothing else about what is trained, and an objective knows nothing of updates or processes. Letters: N
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from smidgen.data.packing import Batch, micro_batches
from smidgen.data.rows import TokenRows
from smidgen.models.scores import token_losses


@dataclass(frozen=True)
class Collating:
    """How rows become micro-batches: the most tokens in one, whether rows are packed or padded, the padding token."""

    token_budget: int
    packing: bool
    pad_id: int


class Objective:
    """Next-token prediction on the supervised tokens: what `sft` and `pretrain` both learn; their data differ."""

    def collate(self, rows: TokenRows, update: Sequence[int], how: Collating) -> list[Batch]:
        """Cut the rows of one update into micro-batches."""
        return micro_batches(rows, update, token_budget=how.token_budget, packing=how.packing, pad_id=how.pad_id)

    def count(self, batch: Batch) -> int:
        """How many values `loss` answers for this batch."""
        return batch.supervised

    def prepare(self, model: nn.Module, batch: Batch) -> None:
        """Compute what needs no gradient and add it to the batch; here nothing."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The values of a batch, with gradient, (N,) float32, not averaged; and the rows they belong to, (N,) int64."""
        return token_losses(model, batch)


OBJECTIVES: dict[str, type[Objective]] = {"sft": Objective, "pretrain": Objective}
