"""AdamW and Lion, slice by slice: each number moves by itself, so the states may be in 8 bits, in pages, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from smidgen.training.optimizers.blockwise import BLOCK, dequantise, quantise
from smidgen.training.optimizers.pages import Pages
from smidgen.training.optimizers.states import Named

SLICE = 2**18  # numbers at once: whole blocks, whole pages, and what a processor's cache holds

# What takes a slice of a parameter, of its gradient and of its states, the steps before this one, and the group.
Rule = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor, Mapping[str, Any]], None]


def move_adamw(
    parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor], step: Tensor, group: Mapping[str, Any]
) -> None:
    """Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101."""
    adamw(
        [parameter],
        [gradient],
        [states["exp_avg"]],
        [states["exp_avg_sq"]],
        [],
        [step.clone()],  # which it would count on
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=1e-8,
        maximize=False,
    )


def move_lion(
    parameter: Tensor, gradient: Tensor, states: Mapping[str, Tensor], step: Tensor, group: Mapping[str, Any]
) -> None:
    """Chen et al., Symbolic Discovery of Optimization Algorithms, https://arxiv.org/abs/2302.06675."""
    mean, rate = states["exp_avg"], group["lr"]
    direction = mean.mul(0.9).add_(gradient, alpha=0.1).sign_()
    parameter.mul_(1 - rate * group["weight_decay"]).sub_(direction, alpha=rate)
    mean.mul_(0.99).add_(gradient, alpha=0.01)


RULES: dict[str, Rule] = {"adamw": move_adamw, "lion": move_lion}
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class Sliced(Named):
    """Moves parameters by a rule, with states as the layout says: float32, or 8 bits where a state has its absmax.

    Args:
        pages_in: the folder of the file that holds the states; None: they are held in memory.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], rate: float, rule: Rule, pages_in: Path | None):
        super().__init__(groups, {"lr": rate})
        self._rule, self._pages_in = rule, pages_in
        self._pages: Pages | None = None

    def zeros(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        parameter.data = parameter.data.contiguous()  # its numbers are addressed in a row
        if self._pages_in is None:
            return super().zeros(name, parameter)
        self._pages = pages = self._pages or Pages(self._pages_in, self.layout)
        return {what: pages[name, what] if state.ndim else torch.zeros(()) for what, state in self.layout[name].items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        self._pages = None  # a new file holds zeros
        super().restore(tensors)
        if self._pages:
            self._pages.release()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    states = self.states(name, parameter)
                    for start in range(0, parameter.numel(), SLICE):
                        self._move(parameter, states, slice(start, start + SLICE), group)
                    states["step"] += 1

    def _move(self, parameter: nn.Parameter, states: dict[str, Tensor], part: slice, group: Mapping[str, Any]) -> None:
        blocks = slice(part.start // BLOCK, part.stop // BLOCK)
        stored = {what: states[what].view(-1)[part] for what in _SIGNED if what in states}
        absmax = {what: states[f"{what}_absmax"][blocks] for what in stored if f"{what}_absmax" in states}
        read = {
            what: dequantise(state, absmax[what], _SIGNED[what]) if what in absmax else state
            for what, state in stored.items()
        }
        assert parameter.grad is not None
        self._rule(parameter.view(-1)[part], parameter.grad.reshape(-1)[part], read, states["step"], group)
        for what, largest in absmax.items():
            codes, found = quantise(read[what], _SIGNED[what])
            stored[what].copy_(codes)
            largest.copy_(found)
        if self._pages:
            self._pages.used(sum(state.nbytes for state in (*stored.values(), *absmax.values())))
