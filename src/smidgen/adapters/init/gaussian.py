"""A normal with standard deviation 1/R, B zero."""

import torch
from torch import Tensor

from smidgen.adapters.init import Start


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A ~ N(0, 1/R^2), B = 0."""
    a = torch.randn(r, start.shape[1], device=start.device) / r
    return a, torch.zeros(start.shape[0], r, device=start.device), False
