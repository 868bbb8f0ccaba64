"""A normal with standard deviation 1/R, B zero."""

import torch
from torch import Tensor


def initialise(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A ~ N(0, 1/R^2), B = 0."""
    a = torch.randn(r, weight.shape[1], device=weight.device) / r
    return a, torch.zeros(weight.shape[0], r, device=weight.device), False
