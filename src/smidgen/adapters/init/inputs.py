"""What layers are given while a model runs over batches. Letters: B rows, T tokens, N tokens that count, in inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]


@torch.no_grad()
def run_watched(model: nn.Module, batch: Batch, tell: Mapping[str, Callable[[Tensor], None]]) -> None:
    """Run the model over a batch; each layer of `tell`, by path, is told its inputs (B, T, in)."""

    def hook(tell_one: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: tell_one(args[0].detach())

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(one)) for path, one in tell.items()]
    try:
        model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()


def counted(batch: Batch, ignored: int | None = None) -> Tensor | None:
    """(B, T): which tokens of a batch are no padding and, where `ignored` is given, do not have it as their label."""
    mask = batch.get("attention_mask")
    if mask is None and "input_ids" in batch:
        mask = torch.ones_like(batch["input_ids"])
    if mask is None or ignored is None or "labels" not in batch:
        return None if mask is None else mask.bool()
    return mask.bool() & (batch["labels"] != ignored)


def tokens_of(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """(N, in) float32: the inputs at the tokens that count; at all where a layer is not called with the batch's."""
    there = mask is not None and inputs.shape[:-1] == mask.shape
    found = (inputs[mask] if there else inputs.flatten(0, -2)).float()
    return found.cpu() if found.device.type == "mps" else found  # which has no float64 and few decompositions


def first_with_same_inputs(model: nn.Module, paths: list[str], batch: Batch) -> dict[str, str]:
    """For each layer the first one that is given the same, as queries, keys and values are.

    What is found for one holds for all. Layers that the batch does not reach are left out.
    """
    leaders: dict[str, str] = {}
    last: list[tuple[str, Tensor]] = []

    def tell(path: str) -> Callable[[Tensor], None]:
        def compare(x: Tensor) -> None:
            same = last and x.dtype == last[0][1].dtype and torch.equal(x, last[0][1].to(x.device))
            leaders.setdefault(path, last[0][0] if same else path)
            if not same:
                last[:] = [(path, x)]

        return compare

    run_watched(model, batch, {path: tell(path) for path in paths})
    return {path: leaders[path] for path in paths if path in leaders}
