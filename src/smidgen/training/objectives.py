"""Objectives: what a batch is made of, what is computed before the gradient, and the values that become the loss.

The loop knows nothing else about what is trained, and an objective knows nothing of optimizers or processes. Letters: N
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from smidgen.data.images import ImageReader
from smidgen.data.packing import cut, micro_batches
from smidgen.data.preference_data import Preferences, prepare_preferences
from smidgen.data.prepare import Prepared, Progress, prepare_data
from smidgen.data.task_rows import TaskBatch, task_batch
from smidgen.models.resolve import cache_folder
from smidgen.models.scores import token_losses
from smidgen.models.tasks import task_losses
from smidgen.recipe import Recipe
from smidgen.registry import OBJECTIVES

Total = Callable[[Tensor], Tensor]  # adds a tensor up over all processes


@dataclass(frozen=True)
class Collating:
    """How rows become micro-batches.

    token_budget: the most tokens in one, of whole rows. packing: whether rows are packed or padded. pad_id: the padding
    token. sharing: whether packed rows share what they begin with, see `data.packing.Branches`.
    """

    token_budget: int
    packing: bool
    pad_id: int
    sharing: bool = False


class Losses(NamedTuple):
    """What a batch gives: values, (N,) float32, not averaged; of which rows, (N,) int64; and what is logged beside.

    metrics: under each of the objective's names values without gradient, any number, whose mean is logged.
    """

    values: Tensor
    rows: Tensor
    metrics: Mapping[str, Tensor] = {}


class Objective:
    """Next-token prediction on the supervised tokens: what `sft` and `pretrain` both learn; their data differ."""

    metrics: tuple[str, ...] = ()  # names of what is logged beside the loss

    @classmethod
    def of(cls, recipe: Recipe) -> Objective:
        """The objective as a recipe sets it."""
        return cls()

    def begin(self, model: Any, as_base: bool) -> None:
        """Called once, the model being complete and as it starts.

        Args:
            as_base: whether it may start as the base: its adapter is new, and so is no row of its vocabulary.
        """

    def collate(self, rows: Any, update: Sequence[int], how: Collating) -> list[Any]:
        """Cut the rows of one update into micro-batches."""
        return micro_batches(rows, update, **vars(how))

    def count(self, batch: Any) -> int:
        """How many values `loss` answers for this batch."""
        return batch.supervised

    def prepare(self, model: Any, batches: Sequence[Any], total: Total = lambda tensor: tensor) -> list[Any]:
        """The micro-batches of a whole update with what needs no gradient; here nothing is added.

        Args:
            batches: those of this process, which may have none.
            total: adds a tensor up over all processes, which call it alike.
        """
        return [*batches]

    def loss(self, model: Any, batch: Any) -> Losses:
        """The values of a batch that was prepared, with gradient."""
        return Losses(*token_losses(model, batch))

    @contextmanager
    def at_start(self, model: Any) -> Iterator[None]:
        """The model as it was before the training, inside the block."""
        with model.disable_adapter():
            yield


class Labelled(Objective):
    """Cross-entropy of the labels of rows: classes, the ends of answers, or the tokens of a target."""

    def __init__(self, task: str):
        self.task = task

    def collate(self, rows: Any, update: Sequence[int], how: Collating) -> list[TaskBatch]:
        groups = cut(rows, update, token_budget=how.token_budget, packing=False)
        return [task_batch([rows[index] for index in group], group, how.pad_id) for group in groups]

    def loss(self, model: Any, batch: TaskBatch) -> Losses:
        return Losses(*task_losses(model, batch, self.task))


def objective_of(recipe: Recipe) -> Objective:
    """The objective of a recipe."""
    if recipe.task != "causal_lm":
        return Labelled(recipe.task)
    return OBJECTIVES[recipe.objective].load().of(recipe)


def read_data(
    recipe: Recipe,
    tokenizer: Any,
    stop_ids: set[int],
    progress: Progress | None = None,
    images: ImageReader | None = None,
) -> Prepared | Preferences:
    """The rows that the objective of a recipe learns from.

    Raises:
        DataError: files or rows are wrong.
    """
    if recipe.objective in ("dpo", "kto", "reward"):
        labelled = recipe.objective == "kto"
        return prepare_preferences(
            recipe.data, tokenizer, labelled=labelled, seed=recipe.seed, stop_ids=stop_ids, progress=progress
        )
    return prepare_data(
        recipe.data,
        tokenizer,
        objective=recipe.objective,
        seed=recipe.seed,
        cache_dir=cache_folder() / "tokens",
        stop_ids=stop_ids,
        images=images,
        progress=progress,
    )
