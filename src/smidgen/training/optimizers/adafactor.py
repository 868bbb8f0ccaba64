"""Adafactor: the squares of a matrix's gradients are known by the means of its rows and of its columns alone.

Source: Shazeer and Stern, Adafactor, https://arxiv.org/abs/1804.04235, as transformers' Trainer sets it: the learning
rate is the recipe's (no relative step, no scaling by the parameter's size), and there is no first moment. PyTorch's own
always scales by the parameter's size, by which a matrix that starts as zeros, such as LoRA's B, would hardly move.
R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.training.optimizers.states import Named

_FLOOR = 1e-30  # added to squares
_DECAY = -0.8


class Adafactor(Named):
    """Moves each parameter by its gradient over the root of its mean square, clipped to a root mean square of 1."""

    def __init__(self, groups: Iterable[dict[str, Any]], rate: float):
        super().__init__(groups, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            rate = group["lr"]
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    update = _direction(parameter.grad, self.states(name, parameter))
                    parameter.mul_(1 - rate * group["weight_decay"]).sub_(update, alpha=rate)


def _direction(gradient: Tensor, states: Mapping[str, Tensor]) -> Tensor:
    """Where to move, of the gradient's shape; the states are moved on."""
    states["step"].add_(1)
    weight = states["step"].item() ** _DECAY  # of this step in the means
    squares = gradient.square().add_(_FLOOR)
    if "exp_avg_sq" in states:
        update = states["exp_avg_sq"].lerp_(squares, weight).rsqrt()
    else:
        rows = states["exp_avg_sq_row"].lerp_(squares.mean(dim=-1), weight)  # (..., R)
        columns = states["exp_avg_sq_col"].lerp_(squares.mean(dim=-2), weight)  # (..., C)
        scale = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_()
        update = torch.mul(scale[..., None], columns.rsqrt()[..., None, :], out=squares)
    update.mul_(gradient)
    size = update.square().mean().sqrt().clamp_(min=1.0)
    return update.div_(size)
