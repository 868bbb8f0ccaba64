"""What soft tokens are near to: the vocabulary's tokens whose embeddings point the same way."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from smidgen.adapters.attach import adapters_of
from smidgen.adapters.soft import SoftPrompt
from smidgen.errors import UsageError

_ROWS = 8192  # of the vocabulary that are compared at a time


@torch.no_grad()
def nearest_tokens(model: Any, count: int) -> list[list[tuple[int, float]]]:
    """For each virtual token of the active prompt: the ids nearest to it, with the cosine of the angle, best first.

    Raises:
        UsageError: the model has no soft prompt; those of prefix tuning are keys and values, and near to no token.
    """
    prompt = dict(adapters_of(model, model.active_adapter)).get("")
    if not isinstance(prompt, SoftPrompt):
        raise UsageError("readout: the adapter has no soft tokens; it reads prompt_tuning and p_tuning")
    vectors = F.normalize(prompt.vectors().float(), dim=1)
    weight = model.get_input_embeddings().weight
    parts = [vectors @ F.normalize(part.float(), dim=1).T for part in weight.split(_ROWS)]
    values, ids = torch.cat(parts, dim=1).topk(min(count, len(weight)), dim=1)
    return [list(zip(row, cosines, strict=True)) for row, cosines in zip(ids.tolist(), values.tolist(), strict=True)]
