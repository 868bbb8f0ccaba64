"""Which states an optimizer has for each parameter, and how they are saved and restored by the parameters' names.

An optimizer's name says three things: ``paged_adamw_8bit`` is the rule AdamW, its states in 8 bits, held in pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from smidgen.adapters.attach import schedules
from smidgen.training.optimizers.blockwise import BLOCK

SMALLEST = 4096  # numbers: the states of smaller tensors stay in float32; the same in bitsandbytes
PAGED = 2**25  # bytes of paged states that are in the memory at once
_ABSMAX = "_absmax"
_STATES = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",), "adafactor": ("exp_avg_sq",)}

Layout: TypeAlias = dict[str, dict[str, Tensor]]  # parameter -> state -> a tensor without data


def rule_of(optim: str) -> str:
    """The name of the update rule."""
    return optim.removeprefix("paged_").removesuffix("_8bit")


def is_paged(optim: str) -> bool:
    """Whether the states may leave the memory."""
    return optim.startswith("paged_")


def is_eight_bit(optim: str) -> bool:
    """Whether the states are kept in 8 bits."""
    return optim.endswith("_8bit")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that need a gradient, by name; a tied one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layout_of(model: nn.Module, optim: str) -> Layout:
    """The states of every trainable parameter, with what adapters that follow the training keep of it.

    The embedding's states stay in float32: rows of rare tokens share blocks with frequent ones.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    statistics = {p: names for schedule in schedules(model) for p, names in schedule.statistics().items()}
    layout: Layout = {}
    for name, parameter in trainable(model).items():
        narrow = is_eight_bit(optim) and parameter.numel() >= SMALLEST and id(parameter) not in embeddings
        layout[name] = states = {"step": _empty((), torch.float32)}
        for what, shape in _shapes(rule_of(optim), parameter.shape).items():
            states[what] = _empty(shape, torch.uint8 if narrow else torch.float32)
            if narrow:
                states[what + _ABSMAX] = _empty((-(-parameter.numel() // BLOCK),), torch.float32)
        states |= {what: _empty(parameter.shape, torch.float32) for what in statistics.get(parameter, ())}
    return layout


def _shapes(rule: str, shape: torch.Size) -> dict[str, torch.Size]:
    if rule == "adafactor" and len(shape) > 1:
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
    return dict.fromkeys(_STATES[rule], shape)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def state_bytes(model: nn.Module, optim: str) -> int:
    """The bytes of all states, wherever they are."""
    return sum(state.nbytes for states in layout_of(model, optim).values() for state in states.values())


def held_bytes(model: nn.Module, optim: str) -> int:
    """The bytes of the states that are in the memory at once."""
    size = state_bytes(model, optim)
    return min(size, PAGED) if is_paged(optim) else size


class Named(torch.optim.Optimizer):
    """An optimizer whose states are saved and restored by the names of their parameters.

    Its groups carry the `names` of their parameters; `make_optimizer` sets the layout.
    """

    layout: Layout

    @property
    def named(self) -> dict[str, nn.Parameter]:
        return {name: p for group in self.param_groups for name, p in zip(group["names"], group["params"], strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """The states as ``<parameter>.<state>``."""
        return {
            f"{name}.{what}": tensor
            for name, parameter in self.named.items()
            for what, tensor in self.state.get(parameter, {}).items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over states that `tensors` answered; those of a spread parameter are spread as it is."""
        self.state.clear()
        parameters = self.named
        for key, tensor in tensors.items():
            name, _, what = key.rpartition(".")
            self.states(name, parameters[name])[what].copy_(tensor)

    def states(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The states of a parameter, zeros at first."""
        if parameter not in self.state:
            self.state[parameter] = self.zeros(name, parameter)
        return self.state[parameter]

    def zeros(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """New states; those of the parameter's shape are spread as it is."""
        return {
            what: torch.zeros_like(parameter, dtype=like.dtype)
            if like.shape == parameter.shape
            else torch.zeros_like(like, device=parameter.device)
            for what, like in self.layout[name].items()
        }
