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


def relative_error(ours: Tensor, exact: Tensor, size: Tensor | None = None) -> float:
    """The norm of the difference over that of `size`, the exact value unless said; over 0.01 where it is nothing."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / (exact if size is None else size.detach()).norm().clamp_min(1e-2))


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int, positive: bool = False
) -> list[Tensor]:
    """What `function` answers, and the gradient of each floating-point input for random gradients of the outputs.

    `positive` drops the signs of those random gradients.
    """
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    answer = function(*inputs)
    outputs = list(answer) if isinstance(answer, tuple) else [answer]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(y.shape, generator=generator).bfloat16() for y in outputs]  # a number of every type
    grads = [g.abs() if positive else g for g in grads]
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
    sums: bool = False,
) -> None:
    """Outputs and gradients of `ours` against `plain` in float64.

    In float32 the error is at most `float32_error`; in bfloat16 `slack` times that of rounding n results once, which is
    1.8e-3 and spreads with 1/sqrt(n); in either, or `factor` times the error of plain PyTorch, with the same spread.
    `sums` says that `plain` only adds products of its inputs: the terms of a few results may cancel and keep their
    rounding, so the error of those is taken relative to the same sums without signs.
    """
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = outputs_and_gradients(plain, doubles, 1)
    unsigned = outputs_and_gradients(plain, [x.abs() for x in doubles], 1, positive=True) if sums else exact
    mine = outputs_and_gradients(ours, inputs, 1)
    theirs = outputs_and_gradients(plain, inputs, 1)
    narrow = inputs[0].dtype == torch.bfloat16
    for i, (m, t, e, u) in enumerate(zip(mine, theirs, exact, unsigned)):
        assert m.shape == e.shape
        assert m.isfinite().all(), i
        size, spread = u if e.numel() < 100 else e, 1 + 4 / max(e.numel(), 1) ** 0.5
        bound = slack * 1.8e-3 * spread if narrow else float32_error
        error, limit = relative_error(m, e, size), max(bound, factor * spread * relative_error(t, e, size))
        assert error <= limit, f"result {i}: error {error:.2e}, allowed {limit:.2e}"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 31 * len(shape) + sum(shape))).to(dtype)
