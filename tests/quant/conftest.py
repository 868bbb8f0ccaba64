"""What the tests of stored weights share."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="session")
def bnb() -> ModuleType:
    """bitsandbytes, which is compared with."""
    return pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'smidgen[test]'")


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(O, I) like those of a model: rows of unlike sizes, a few large numbers, a row of zeros, exact midpoints."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight *= torch.rand(rows, 1, generator=generator) + 0.1
    weight[torch.rand(rows, columns, generator=generator) < 0.003] *= 30
    weight[rows // 2] = 0
    if rows > 2:  # numbers halfway between codes, under a largest of 1
        weight[1] = torch.randint(-16, 17, (columns,), generator=generator) / 16
        weight[1, ::32] = 1
    return weight.to(dtype)
