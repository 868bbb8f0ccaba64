"""A and B hold the principal part of the weight and the base answers without it (PiSSA, https://arxiv.org/abs/2404.02948)."""

import torch
from torch import Tensor


def initialise(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """s B A = the best rank-R approximation of the weight, split evenly: B = U sqrt(S/s), A = sqrt(S/s) V^T."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root, True
