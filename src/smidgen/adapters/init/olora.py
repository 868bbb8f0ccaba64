"""A and B from the QR decomposition of the weight and the base answers without them (OLoRA, https://arxiv.org/abs/2406.01775)."""

import torch
from torch import Tensor

from smidgen.adapters.init import Start


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """W = Q R: B = the first columns of Q, A = the first rows of R."""
    q, upper = torch.linalg.qr(start.read())
    return upper[:r].contiguous(), q[:, :r].contiguous(), True
