"""Gradients of single weights over data, while nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import UsageError


def mean_gradients(
    model: nn.Module,
    paths: list[str],
    batches: Iterable[Mapping[str, Any]],
    of: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> list[Tensor]:
    """The mean over batches of `of` the loss's gradient with respect to the weight of each layer, in fp32.

    Args:
        batches: keyword arguments of calls of the model, with labels, so that it answers a loss.

    Raises:
        UsageError: there are no batches, or the model answers no loss.
    """
    weights: list[Any] = [model.get_submodule(path).weight for path in paths]
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    totals = [torch.zeros(weight.shape, device=weight.device) for weight in weights]
    count = 0
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                count += 1
                loss = getattr(model(**batch), "loss", None)
                if loss is None:
                    raise UsageError("batches: the model answers no loss; give labels")
                for total, gradient in zip(totals, torch.autograd.grad(loss, weights), strict=True):
                    total += of(gradient.float())
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    if not count:
        raise UsageError("batches: there are none")
    return [total / count for total in totals]
