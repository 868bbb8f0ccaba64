"""bitsandbytes' optimizers, for CUDA: states in 8 bits, and paged ones, which the driver moves to the host's memory.

The library is imported only when one is made. States have the names, the code book and the blocks that they have on a
CPU. Tested on a CPU, where bitsandbytes computes in 8 bits and pages nothing; not on CUDA.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from smidgen.training.optimizers.states import SMALLEST, Layout, Named, is_eight_bit, is_paged, rule_of

_CLASSES = {"adamw": "AdamW", "lion": "Lion"}
_THEIRS = {
    "step": "step",
    "exp_avg": "state1",
    "exp_avg_sq": "state2",
    "exp_avg_absmax": "absmax1",
    "exp_avg_sq_absmax": "absmax2",
}


def from_bitsandbytes(groups: list[dict[str, Any]], rate: float, optim: str, layout: Layout) -> Named:
    """The optimizer called `optim`, of bitsandbytes' code."""
    library: Any = importlib.import_module("bitsandbytes")
    base: Any = getattr(library.optim, _CLASSES[rule_of(optim)])

    class Bitsandbytes(Named, base):
        def tensors(self) -> dict[str, Tensor]:
            return {
                f"{name}.{what}": torch.as_tensor(self.state[parameter][_THEIRS.get(what, what)], dtype=like.dtype)
                for name, parameter in self.named.items()
                if parameter in self.state
                for what, like in self.layout[name].items()
            }

        def restore(self, tensors: Mapping[str, Tensor]) -> None:
            self.state.clear()
            for number, group in enumerate(self.param_groups):
                for index, (name, parameter) in enumerate(zip(group["names"], group["params"], strict=True)):
                    if f"{name}.step" in tensors:
                        self.init_state(group, parameter, number, index)
                        for what in self.layout[name].keys() - {"step"}:
                            own = self.state[parameter].setdefault(_THEIRS.get(what, what), torch.zeros_like(parameter))
                            own.copy_(tensors[f"{name}.{what}"])
                        self.state[parameter]["step"] = int(tensors[f"{name}.step"])

    make: Any = Bitsandbytes
    optimizer = make(groups, lr=rate, optim_bits=8 if is_eight_bit(optim) else 32, is_paged=is_paged(optim))
    for name, parameter in optimizer.named.items():
        if parameter.numel() >= SMALLEST and layout[name]["exp_avg"].dtype == torch.float32:
            optimizer.mng.override_config(parameter, "optim_bits", 32)
    return optimizer
