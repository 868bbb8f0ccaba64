"""A and B hold the principal part of the weight, the base answers without it (PiSSA, https://arxiv.org/abs/2404.02948)."""

import torch
from torch import Tensor

from smidgen.adapters.init import Start


def initialise(start: Start, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor, bool]:
    """s B A = the best rank-R approximation of the weight, split evenly: B = U sqrt(S/s), A = sqrt(S/s) V^T.

    Args:
        niter: approximate it with so many iterations of a randomised decomposition. The random numbers are always the
            same, so that loading an adapter finds the start that it was trained from.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(start.read(), full_matrices=False)
        u, s, vh = u[:, :r], s[:r], vh[:r]
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(start.read(), r, niter=niter)
        vh = v.T
    root = (s / scaling).sqrt()
    return root[:, None] * vh, u * root, True
