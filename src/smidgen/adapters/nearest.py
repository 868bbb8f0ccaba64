"""The nearest update of a given rank to a whole one, and what of it is lost.

Legend: an update is a matrix (out, in), R the rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """B A, the nearest to an update of all matrices of rank R, in the Frobenius norm."""

    a: Tensor  # (n, in), n <= R, with orthonormal rows
    b: Tensor  # (out, n)
    norm: float  # of the update
    error: float  # the norm of what is left out


def nearest(update: Tensor, rank: int, driver: str | None = None) -> Nearest:
    """Cut the singular value decomposition of `update` (out, in) off at `rank`.

    Args:
        driver: of the decomposition on CUDA, as in ``torch.linalg.svd``.
    """
    u, s, vh = torch.linalg.svd(update, full_matrices=False, driver=driver)
    values = s.double()
    return Nearest(vh[:rank], u[:, :rank] * s[:rank], values.norm().item(), values[rank:].norm().item())


def kept_lines(found: Mapping[str, Nearest], rank: int) -> list[str]:
    """A line for each kind of layer (the last name of its path), and one for all: how much of the updates is kept."""
    kinds: defaultdict[str, list[Nearest]] = defaultdict(list)
    for path, one in found.items():
        kinds[path.rpartition(".")[2]].append(one)
    if len(kinds) > 1:
        kinds["all"] = list(found.values())
    return [f"{kind} x{len(group)}: {_kept(group, rank)}" for kind, group in kinds.items()]


def _kept(group: list[Nearest], rank: int) -> str:
    errors = [one.error / one.norm if one.norm else 0.0 for one in group]
    norm = math.hypot(*(one.norm for one in group))
    error = math.hypot(*(one.error for one in group)) / norm if norm else 0.0
    kept = math.sqrt(max(0.0, 1 - error * error))
    return f"rank {rank} keeps {kept:.2%} of the update's norm, error {error:.2g} (largest {max(errors):.2g})"
