"""How LoRA's factors start: one file each.

Every module has `initialise(start, r, scaling)` for a weight matrix (out, in). It answers A (R, in), B (out, R) in fp32
and whether the base is to answer without their product, so that the start is the base model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Start(NamedTuple):
    """The matrix that is to be adapted: its sides, where it is, and the matrix itself in fp32 for those who need it."""

    shape: tuple[int, int]  # (out, in)
    device: torch.device
    read: Callable[[], Tensor]
