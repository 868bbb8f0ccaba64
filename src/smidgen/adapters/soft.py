"""Soft prompts: virtual tokens that are vectors before the embedded tokens of every row.

Legend: B rows, T tokens of the caller, N virtual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.base import Inner
from smidgen.adapters.prompts import Prompt, pad_vectors
from smidgen.errors import UsageError


class SoftPrompt(Prompt):
    """`vectors` (N, D) stand before the embedded tokens."""

    family = "soft prompts"

    @classmethod
    def take_in(cls, inner: Inner, call: dict[str, Any], prompts: Sequence[Prompt | None], spare: Tensor) -> Any:
        model, ids, embeds = inner.module, call.pop("input_ids", None), call.get("inputs_embeds")
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        length = embeds.shape[1]
        front = pad_vectors(prompts, spare).to(embeds)
        rows, width = front.shape[:2]
        call["inputs_embeds"] = torch.cat([front, embeds], dim=1)
        mask = call.get("attention_mask")
        if hasattr(model, "score") and mask is not None and not mask[:, -1].all():
            raise UsageError(
                "attention_mask: a classifier that reads the last token looks for it in the last column where a prompt "
                "stands before the rows: pad on the left"
            )
        labels, segments, kept = (call.get(name) for name in ("labels", "token_type_ids", "logits_to_keep"))
        if isinstance(labels, Tensor) and labels.shape == (rows, length):
            call["labels"] = torch.cat([labels.new_full((rows, width), -100), labels], dim=1)
        if segments is not None:
            call["token_type_ids"] = torch.cat([segments.new_zeros((rows, width)), segments], dim=1)
        if isinstance(kept, Tensor):
            call["logits_to_keep"] = kept + width
        for name in ("start_positions", "end_positions"):
            if call.get(name) is not None:
                call[name] = call[name] + width
        positions = call.get("position_ids")
        if positions is not None:
            first = positions.amin(-1, keepdim=True) - (width - spare)[:, None]  # the caller's own; after other prompts
            own = first + (torch.arange(width, device=positions.device) - spare[:, None]).clamp(min=0)
            call["position_ids"] = torch.cat([own, positions], dim=-1)
        return _cut(inner(**call), length)


def _cut(answer: Any, length: int) -> Any:
    """An answer without the columns of the virtual tokens."""
    for name in ("logits", "last_hidden_state", "start_logits", "end_logits"):
        value = answer.get(name)
        if isinstance(value, Tensor) and value.shape[1] > length and value.dim() == (2 if "_logits" in name else 3):
            answer[name] = value[:, -length:]
    if answer.get("hidden_states") is not None:
        answer["hidden_states"] = tuple(states[:, -length:] for states in answer["hidden_states"])
    return answer
