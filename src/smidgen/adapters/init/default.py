"""A uniform as ``nn.Linear`` starts, B zero (LoRA, https://arxiv.org/abs/2106.09685, section 4.1)."""

import math

import torch
from torch import Tensor, nn

from smidgen.adapters.init import Start


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
    a = torch.empty(r, start.shape[1], device=start.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(start.shape[0], r, device=start.device), False
