"""How LoRA's factors start: one file each.

Every module has `initialise(start, r, scaling)` for a weight matrix (out, in). It answers A (R, in), B (out, R) in fp32
and whether the base is to answer without their product, so that the start is the base model.

Starts that need more than the weight also have `measure(model, config, paths, source)`: it answers a function from the
path of a layer to what `initialise` is told about it. `smidgen.adapters.init.measured` calls both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Start(NamedTuple):
    """The matrix that is to be adapted: its sides, where it is, and the matrix itself in fp32 for those who need it."""

    shape: tuple[int, int]  # (out, in)
    device: torch.device
    read: Callable[[], Tensor]
    measured: Any = None  # what was measured at this layer
    options: Any = None  # the part of the configuration that is about this start


def leading_directions(matrix: Tensor, count: int, niter: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, count), S (count,) and V^T (count, n): a randomised decomposition of a matrix (m, n).

    The random numbers are always the same, and the caller's generator stays as it is.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(matrix, min(count, *matrix.shape), niter=niter)
    return u, s, v.T
