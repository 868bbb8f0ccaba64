"""What a model thinks of given tokens. Letters: B rows, T tokens, N supervised tokens, V vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from smidgen.data.packing import IGNORED, Batch, batch_of
from smidgen.data.rows import TokenRow
from smidgen.kernels import linear_cross_entropy
from smidgen.losses.lm import token_cross_entropy
from smidgen.models import attention
from smidgen.models.images import image_inputs


@dataclass(frozen=True)
class Head:
    """What follows the last layer of a model: z = scale layer(h), or softcap tanh(z / softcap)."""

    softcap: float | None
    scale: float


# The attribute of a model, set by `models.fuse`, whose losses may be computed from hidden states in chunks.
HEAD = "fused_head"
# Where a module keeps what was registered around its calls.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Learned(NamedTuple):
    """Where a batch is learned.

    rows, columns: (N,) the places whose logits count. targets: (N,) the tokens that follow. kept: the columns without
    repeats. place: (N,) where in `kept` each column stands.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    targets: torch.Tensor
    kept: torch.Tensor
    place: torch.Tensor


def learned(batch: Batch) -> Learned:
    """Find the places of a batch whose next token is supervised."""
    follows = batch.labels[:, 1:] != IGNORED
    rows, columns = follows.nonzero(as_tuple=True)
    if batch.branches is not None:
        columns = batch.branches.before[columns + 1]
    kept = columns.unique()
    return Learned(rows, columns, batch.labels[:, 1:][follows], kept, torch.searchsorted(kept, columns))


def token_losses(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of every supervised token of a batch.

    Returns:
        (N,) float32 losses in nats, and (N,) int64 indices of the rows they belong to.
    """
    return losses_at(model, batch), learned_rows(batch)


def losses_at(model: Any, batch: Batch, at: Learned | None = None) -> torch.Tensor:
    """(N,) float32: the cross-entropy in nats of the supervised tokens of a batch, or of those that follow `at`.

    The vocabulary is the widest matrix of a small model, so logits are computed only where a supervised token follows:
    exactly there in a packed batch, in the union of the rows' columns in a padded one. A model whose forward has no
    `logits_to_keep` computes them all. Packed rows are told apart by their `position_ids`, without an attention mask.
    """
    batch = _computable(model, batch)
    at = at or learned(batch)
    if head := _head(model):
        # The decoder knows no images: what stands around it puts them among the tokens.
        states = getattr(model, model.base_model_prefix) if batch.images else model.get_decoder()
        with attention.branching(batch.branches):
            hidden = states(**_inputs(model, batch)).last_hidden_state[at.rows, at.columns]
        layer = model.get_output_embeddings()
        options = {"softcap": head.softcap, "logit_scale": head.scale}
        return linear_cross_entropy(hidden, layer.weight, at.targets, layer.bias, **options)
    return token_cross_entropy(logits_at(model, batch, at), at.targets)


def logits_at(model: Any, batch: Batch, at: Learned | None = None) -> torch.Tensor:
    """(N, V): the logits from which the supervised tokens of a batch follow, or those `at` the given places."""
    batch = _computable(model, batch)
    at = at or learned(batch)
    inputs, columns = _inputs(model, batch), at.columns
    if takes(model, "logits_to_keep"):
        inputs["logits_to_keep"], columns = at.kept, at.place
    with attention.branching(batch.branches):
        return model(**inputs).logits[at.rows, columns]


def _computable(model: Any, batch: Batch) -> Batch:
    """The batch as this model can compute it: rows share beginnings with the kernel's attention alone."""
    return batch if batch.branches is None or attention.in_use(model) else batch.whole()


def _inputs(model: Any, batch: Batch) -> dict[str, Any]:
    given = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    there = {name: tensor for name, tensor in given.items() if tensor is not None}
    images = image_inputs(model, batch.images) if batch.images else {}
    return {"input_ids": batch.input_ids, "use_cache": False} | there | images


def _head(model: Any) -> Head | None:
    """How the answer of the last layer becomes logits, if losses may be taken from what enters that layer."""
    head = vars(model).get(HEAD)
    if head is None or hasattr(model, "adapters"):  # an adapter around the whole model
        return None
    layer = model.get_output_embeddings()
    return head if type(layer) is nn.Linear and not intercepted(layer) and not intercepted(model) else None


def intercepted(module: nn.Module) -> bool:
    """Whether others stand around the calls of a module: hooks, a forward of the instance, a compiled form."""
    parts = vars(module)
    return "forward" in parts or module._compiled_call_impl is not None or any(parts[name] for name in HOOKS)


@torch.no_grad()
def row_losses(
    model: nn.Module, rows: Sequence[tuple[list[int], list[bool]]], images: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """The mean loss of each row (token ids, and which of them are supervised), computed one row at a time.

    Args:
        images: of each row, the paths of its images; None: none has any.
    """
    device = next(model.parameters()).device
    losses = []
    for (ids, supervised), paths in zip(rows, images or [()] * len(rows), strict=True):
        tokens = torch.tensor([ids])
        labels = tokens.masked_fill(~torch.tensor([supervised]), IGNORED)
        labels[:, 0] = IGNORED
        batch = Batch(tokens, labels, None, None, [0], int((labels != IGNORED).sum()), tuple(paths))
        losses.append(token_losses(model, batch.to(device))[0].mean().item())
    return losses


def learned_rows(batch: Batch) -> torch.Tensor:
    """(N,) int64: the indices of the rows that the supervised tokens of a batch belong to."""
    return row_indices(batch)[:, 1:][batch.labels[:, 1:] != IGNORED]


def row_indices(batch: Batch) -> torch.Tensor:
    """(B, T) int64: the index of the row that each token is of, of the first where it is of several; -1: of padding."""
    index = torch.tensor([*batch.rows, -1], device=batch.input_ids.device)
    if batch.branches is not None:
        return index[batch.branches.row][None]
    if batch.position_ids is None:
        return index[:-1, None].expand_as(batch.input_ids)
    return index[(batch.position_ids == 0).flatten().cumsum(0).view_as(batch.position_ids) - 1]


def takes(model: nn.Module, argument: str) -> bool:
    """Whether a `forward` of the model's classes names this argument."""
    forwards = [vars(kind)["forward"] for kind in type(model).__mro__ if callable(vars(kind).get("forward"))]
    return any(argument in inspect.signature(forward).parameters for forward in forwards)


@torch.no_grad()
def shares_beginnings(model: Any) -> bool:
    """Whether a model computes rows with a common beginning, which stands there once, as it does rows by themselves.

    None may see another.
    """
    device, length = next(model.parameters()).device, 6
    if device.type != "cpu" or not attention.in_use(model) or getattr(model.config, "attention_dropout", 0):
        return False
    draw = torch.Generator().manual_seed(0)
    shared, first, second = torch.randint(vocabulary_size(model), (3, length), generator=draw).numpy()
    learned = np.arange(2 * length) >= length

    def losses(*ends: np.ndarray) -> torch.Tensor:
        rows = [TokenRow(np.concatenate([shared, end]), learned, "") for end in ends]
        batch = batch_of(rows, range(len(rows)), packing=True, pad_id=0, sharing=True)
        return losses_at(model, batch)[-length:]

    found, own = losses(first, second), losses(second)
    near = 0.1 if next(model.parameters()).dtype.itemsize == 2 else 1e-3
    alike = torch.equal(found, losses(first[::-1], second))
    return alike and bool(((found - own).abs() <= near * (1 + own)).all())


@torch.no_grad()
def keeps_rows_apart(model: nn.Module) -> bool:
    """Whether rows that share a packed sequence stay apart: another first row leaves the losses of the second."""
    device = next(model.parameters()).device
    length = 8
    first, second = torch.randint(vocabulary_size(model), (2, length), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(length).repeat(2)[None]

    def losses(before: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([before, second])[None]
        labels = ids.masked_fill(torch.arange(2 * length) <= length, -100)
        return token_losses(model, Batch(ids, labels, None, positions, [0, 1], length - 1).to(device))[0]

    return torch.equal(losses(first), losses(first.flip(0)))


def vocabulary_size(model: Any) -> int:
    """How many tokens the model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]
