"""Reward models: a scalar head that reads every token, the last of an answer or of each step. B rows, T tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from smidgen.data.packing import IGNORED, Batch, batch_of
from smidgen.data.rows import TokenRow
from smidgen.data.task_rows import TaskRow, task_batch
from smidgen.errors import ModelError
from smidgen.models.scores import takes
from smidgen.models.tasks import labels_of, task_of

# The name of the head's only class, by objective: by it a saved model is known again.
HEADS = {"reward": "reward", "process_reward": "step_reward"}


def kind_of_reward(model: Any) -> str | None:
    """The objective that a reward model was trained for; None: it is none."""
    labels = labels_of(model) if task_of(model) == "SEQ_CLS" else []
    return next((objective for objective, head in HEADS.items() if labels == [head]), None)


def check_head(model: Any) -> None:
    """Raise `ModelError` where the model has no head of one class that reads every token, as decoders have."""
    if getattr(getattr(model, "score", None), "out_features", None) != 1:
        raise ModelError(
            f"{type(model).__name__} has no scalar head 'score' over its tokens; reward models stand on decoders"
        )


def token_scores(model: Any, batch: Batch) -> Tensor:
    """What the head says of every token, (B, T) float32 or wider; a token is judged with those before it.

    The model's own answer keeps one score of each row, at the last token that is no padding token, which may be the
    stop token too; so what enters the head is caught on the way, and the head computes in float32: 16 bits would give
    the same score to answers that are nearly alike. A decoder needs no mask of padding behind the rows.
    """
    caught: list[Tensor] = []

    def judge(head: Any, given: tuple[Tensor], answer: Tensor) -> None:
        handle.remove()  # the head is called once more
        wide = torch.promote_types(given[0].dtype, torch.float32)
        tensors = {name: tensor.to(wide) for name, tensor in head.named_parameters()}
        with torch.autocast(given[0].device.type, enabled=False):
            caught.append(functional_call(head, tensors, (given[0].to(wide),)))

    inputs = {"use_cache": False} if takes(model, "use_cache") else {}
    handle = model.score.register_forward_hook(judge)
    try:
        model(input_ids=batch.input_ids, **inputs)
    finally:
        handle.remove()
    scores = caught[0][..., 0]
    return scores[:, scores.shape[1] - batch.input_ids.shape[1] :]  # soft prompts stand before the tokens


def answer_scores(model: Any, batch: Batch) -> Tensor:
    """The score of each row, read at its last token, (B,) float32 or wider."""
    scores, mask = token_scores(model, batch), batch.attention_mask
    ends = torch.full_like(batch.input_ids[:, 0], scores.shape[1] - 1) if mask is None else mask.sum(1) - 1
    return scores.gather(1, ends[:, None])[:, 0]


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[TokenRow], pad_id: int, token_budget: int = 4096) -> list[float]:
    """The score of each row, in their order, of so many tokens at once; a row does not depend on its neighbours."""
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index].input_ids))
    while order:
        group = order[: max(1, token_budget // len(rows[order[0]].input_ids))]
        order = order[len(group) :]
        batch = batch_of([rows[index] for index in group], group, packing=False, pad_id=pad_id).to(model.device)
        for index, score in zip(group, answer_scores(model, batch).tolist(), strict=True):
            found[index] = score
    return found


@torch.no_grad()
def score_steps(model: Any, row: TaskRow) -> list[float]:
    """The score of each step of a row, read at its last token."""
    batch = task_batch([row], [0], 0).to(model.device)
    return token_scores(model, batch)[batch.labels != IGNORED].tolist()


def told_scores(model: Any, row: TokenRow | TaskRow) -> str:
    """The score of a row, or of its steps, to be shown."""
    scores = score_steps(model, row) if isinstance(row, TaskRow) else score_rows(model, [row], 0)
    return " ".join(f"{score:.3f}" for score in scores)
