"""A and B hold the principal part of the weight, the base answers without it (PiSSA, https://arxiv.org/abs/2404.02948)."""

import torch
from torch import Tensor

from smidgen.adapters.init import Start, leading_directions


def initialise(start: Start, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor, bool]:
    """s B A = the best rank-R approximation of the weight, split evenly: B = U sqrt(S/s), A = sqrt(S/s) V^T.

    Args:
        niter: approximate it with so many iterations of a randomised decomposition, the same at each load.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(start.read(), full_matrices=False)
    else:
        u, s, vh = leading_directions(start.read(), r, niter, seed=0)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root, True
