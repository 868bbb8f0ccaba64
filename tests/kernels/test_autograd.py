"""How the operations behave in graphs: kept, reused, compiled, without gradient; and how they are chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smidgen import kernels
from smidgen.errors import UsageError
from smidgen.kernels import LowRank
from smidgen.kernels.attention import attention_reference
from smidgen.kernels.cross_entropy import cross_entropy_reference
from smidgen.kernels.norms import rms_norm_reference
from tests.kernels.conftest import random

OFFSETS, TARGETS = torch.tensor([0, 5, 5, 12]), torch.arange(12)
ANGLES = random(12, 8)
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # of x (12, 2, 16)
    "dropout": lambda x: kernels.dropout(x, 0.3, 1),
    "rms_norm": lambda x: kernels.rms_norm(x, x[0, 0], 1e-6),
    "add_rms_norm": lambda x: torch.stack(kernels.add_rms_norm(x, x, x[0, 0], 1e-6)),
    "layer_norm": lambda x: kernels.layer_norm(x, x[0, 0], x[1, 0], 1e-6),
    "swiglu": lambda x: kernels.swiglu(x, x),
    "geglu": lambda x: kernels.geglu(x, x),
    "rope": lambda x: kernels.rope(x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x.flatten(1), x.flatten(1), TARGETS),
    "linear_logprob": lambda x: kernels.linear_logprob(x.flatten(1), x.flatten(1).detach(), TARGETS),
    "lora_linear": lambda x: kernels.lora_linear(x, x[:, 0], None, [LowRank(x[:4, 0], x[:, 1, :4], 0.5, 0.2, 3)]),
    "attention": lambda x: kernels.attention(x, x[:, :1], x[:, 1:], OFFSETS)[0],
}
ALL = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@ALL
def test_graphs_are_independent(kernel_set, operation):
    """Two forwards and one without gradient before a backward, a graph kept for two, the same input used twice."""
    first, second = random(12, 2, 16).requires_grad_(), random(12, 2, 16, seed=1).requires_grad_()
    (alone,) = torch.autograd.grad(operation(first).sum(), first)
    a = operation(first)
    b = operation(second)
    with torch.no_grad():
        assert not operation(second).requires_grad
    (grad,) = torch.autograd.grad(a.sum(), first, retain_graph=True)
    assert torch.equal(grad, alone)
    assert torch.equal(torch.autograd.grad(a.sum(), first)[0], alone)
    b.sum().backward()
    twice = operation(first) + operation(first)
    assert torch.allclose(torch.autograd.grad(twice.sum(), first)[0], 2 * alone, rtol=1e-5, atol=1e-5)


@ALL
def test_gradients_of_the_definition(operation):
    """The definitions in plain PyTorch have the gradients that differences show; float64 always takes them."""
    x = random(12, 2, 16).double().requires_grad_()
    assert torch.autograd.gradcheck(operation, x, fast_mode=True)


@ALL
def test_compiling_takes_the_definition(operation):
    torch.compiler.reset()
    x = random(12, 2, 16)
    ours, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = operation(ours)
    z = torch.compile(operation, backend="aot_eager")(compiled)
    assert torch.allclose(y, z, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    z.sum().backward()
    assert torch.allclose(ours.grad, compiled.grad, rtol=1e-4, atol=1e-4)


@ALL
def test_checkpointing_changes_nothing(kernel_set, operation):
    x, again = random(12, 2, 16).requires_grad_(), random(12, 2, 16).requires_grad_()
    operation(x).sum().backward()
    torch.utils.checkpoint.checkpoint(operation, again, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_definitions_are_used_where_kernels_do_not_fit():
    x = random(3, 8).half()
    assert torch.equal(kernels.rms_norm(x, x[0], 1e-6), rms_norm_reference(x, x[0], 1e-6))
    q = random(3, 1, 264)  # a head wider than any kernel takes
    assert torch.equal(
        kernels.attention(q, q, q, torch.tensor([0, 3]))[0],
        attention_reference(q, q, q, torch.tensor([0, 3]), 264**-0.5)[0],
    )
    hidden, weight = random(3, 8), random(5, 8).bfloat16().to(torch.float64)
    targets = torch.arange(3)
    assert torch.equal(
        kernels.linear_cross_entropy(hidden.double(), weight, targets),
        cross_entropy_reference(hidden.double(), weight, targets),
    )


def test_the_choice_is_told(monkeypatch):
    monkeypatch.delenv("SMIDGEN_KERNELS", raising=False)
    kernels.forget()
    assert kernels.chosen().startswith(f"kernels: {kernels.available()[0]} (")
    monkeypatch.setenv("SMIDGEN_KERNELS", "reference")
    kernels.forget()
    assert "three times as long" in kernels.chosen()
    monkeypatch.setenv("SMIDGEN_KERNELS", "referense")
    kernels.forget()
    with pytest.raises(UsageError, match=r"this machine has .*reference; did you mean 'reference'\?"):
        kernels.chosen()
    monkeypatch.undo()
    kernels.forget()


def test_without_a_library_the_definitions_run(monkeypatch, tmp_path):
    from smidgen.kernels import native

    monkeypatch.delenv("SMIDGEN_KERNELS", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libkernels.so")
    native._library.cache_clear()
    kernels.forget()
    try:
        assert kernels.available() == ["reference"]
        assert "no C++ compiler was found at installation" in kernels.chosen()
        x = random(3, 8)
        assert torch.equal(kernels.rms_norm(x, x[0], 1e-6), rms_norm_reference(x, x[0], 1e-6))
    finally:
        native._library.cache_clear()
        monkeypatch.undo()
        kernels.forget()
