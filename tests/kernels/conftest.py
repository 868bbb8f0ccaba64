"""Every operation against float64, for each instruction set of this machine and for plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from smidgen import kernels


@pytest.fixture(params=kernels.available())
def kernel_set(request, monkeypatch) -> Iterator[str]:
    """Forces one instruction set, or plain PyTorch."""
    monkeypatch.setenv("SMIDGEN_KERNELS", request.param)
    kernels.forget()
    yield request.param
    monkeypatch.undo()
    kernels.forget()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of the exact value, or over 0.01 where that is almost nothing."""
    ours, exact = ours.detach(), exact.detach().double()
    return float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-2))


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int
) -> list[Tensor]:
    """What `function` answers, and the gradient of each floating-point input for random gradients of the outputs."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    answer = function(*inputs)
    outputs = list(answer) if isinstance(answer, tuple) else [answer]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(y.shape, generator=generator).bfloat16() for y in outputs]  # a number of every type
    pairs = [(y, g.to(y.dtype)) for y, g in zip(outputs, grads) if y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    found = torch.autograd.grad([y for y, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return outputs + [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found)]


def check(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    plain: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    float32_error: float = 2e-6,
    factor: float = 1.05,
    slack: float = 1.0,
) -> None:
    """Outputs and gradients of `ours` against `plain` in float64.

    In float32 the error is bounded outright. In bfloat16 it is at most `factor` times that of plain PyTorch in
    bfloat16, or `slack` times what rounding the result once may cost: up to 2^-8 for few numbers, 1.7e-3 for many.
    """
    exact = outputs_and_gradients(plain, [x.double() if x.is_floating_point() else x for x in inputs], 1)
    mine = outputs_and_gradients(ours, inputs, 1)
    theirs = outputs_and_gradients(plain, inputs, 1)
    narrow = inputs[0].dtype == torch.bfloat16
    for i, (m, t, e) in enumerate(zip(mine, theirs, exact)):
        assert m.shape == e.shape
        assert m.isfinite().all(), i
        error, limit = relative_error(m, e), float32_error
        if narrow:
            limit = max(factor * relative_error(t, e), slack * (2**-7.99 if e.numel() < 100 else 1.8e-3))
        assert error <= limit, f"result {i}: error {error:.2e}, allowed {limit:.2e}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))).to(dtype)
