"""A and B non-zero and orthogonal to each other, so that B A = 0 at the start."""

import torch
from torch import Tensor

from smidgen.adapters.init import Start
from smidgen.errors import UsageError


def initialise(start: Start, r: int, scaling: float) -> tuple[Tensor, Tensor, bool]:
    """A from the odd rows, B from the even rows of one random orthogonal matrix (R, R).

    Raises:
        UsageError: R is odd.
    """
    if r % 2:
        raise UsageError(f"init_lora_weights: orthogonal needs an even r, got {r}")
    out_features, in_features = start.shape
    q, _ = torch.linalg.qr(torch.randn(r, r, device=start.device))
    a = (torch.randn(in_features, r // 2, device=start.device) @ q[0::2]).T / 10
    b = torch.randn(out_features, r // 2, device=start.device) @ q[1::2] / 10
    return a.contiguous(), b, False
