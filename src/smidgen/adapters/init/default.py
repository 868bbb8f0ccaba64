"""A uniform as ``nn.Linear`` starts, B zero (LoRA, https://arxiv.org/abs/2106.09685, section 4.1)."""

import math

import torch
from torch import Tensor, nn


def initialise(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0."""
    a = weight.new_empty(r, weight.shape[1])
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    return a, torch.zeros(weight.shape[0], r, device=weight.device), False
