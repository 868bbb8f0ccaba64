"""The linear layer with low-rank updates, and the cross-entropy of a linear head."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from smidgen import kernels
from smidgen.errors import UsageError
from smidgen.kernels import LowRank, lora_linear
from smidgen.kernels.cross_entropy import cross_entropy_reference
from smidgen.kernels.dropout import scaled_mask
from tests.kernels.conftest import check, outputs_and_gradients, random, relative_error

FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def peft_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[LowRank]) -> Tensor:
    """The formula as peft computes it: factors in float32 or wider, their update rounded to the type of the base."""
    y = functional.linear(x, weight, bias)
    for a, b, scaling, p, seed, _ in updates:
        dropped = x.to(a.dtype) * scaled_mask(x.shape, p, seed).to(a.dtype)
        y = y + functional.linear(functional.linear(dropped, a), b).mul(scaling).to(y.dtype)
    return y


@given(
    rows=st.sampled_from([0, 1, 3, 4, 70, 300]),
    inputs=st.sampled_from([1, 16, 33, 100]),
    outputs=st.sampled_from([1, 16, 47, 130]),
    ranks=st.lists(st.sampled_from([1, 2, 4, 7, 8, 16, 33, 64]), min_size=1, max_size=3),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    dtype=DTYPES,
    with_bias=st.booleans(),
)
@FEW
def test_lora_linear(kernel_set, rows, inputs, outputs, ranks, p, dtype, with_bias):
    """The error of adapters in float32 over a base in bfloat16 is not above peft's, where R is at most 32."""
    x, weight = random(2, rows, inputs, dtype=dtype), random(outputs, inputs, dtype=dtype)
    bias = random(outputs, dtype=dtype) if with_bias else torch.zeros(outputs, dtype=dtype)
    factors = [f for i, r in enumerate(ranks) for f in (random(r, inputs, seed=i), random(outputs, r, seed=i))]

    def updates(factors: tuple[Tensor, ...]) -> list[LowRank]:
        pairs = zip(factors[::2], factors[1::2])
        return [LowRank(a, b, 0.5 + i, p, i) for i, (a, b) in enumerate(pairs)]

    narrow_products = kernel_set == "reference" or max(ranks) > 32
    check(
        lambda x, w, bias, *f: lora_linear(x, w, bias if with_bias else None, updates(f)),
        lambda x, w, bias, *f: peft_linear(x, w, bias if with_bias else None, updates(f)),
        [x, weight, bias, *factors],
        slack=5 if narrow_products else 1.3,  # of A, x A', B, the update and the sum
        sums=True,
    )


def test_adapters_of_float32_keep_their_gradients(kernel_set):
    """Over a base in bfloat16 they are as exact as in float32."""
    if kernel_set == "reference":
        pytest.skip("plain PyTorch multiplies the factors in bfloat16")
    x, weight = random(300, 96, dtype=torch.bfloat16), random(64, 96, dtype=torch.bfloat16)

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (lora_linear if x.dtype == torch.bfloat16 else peft_linear)(
            x, weight.to(x.dtype), None, [LowRank(a, b, 2.0, 0.1, 5)]
        )

    inputs = [x, random(8, 96), random(64, 8)]
    _, _, *mine = outputs_and_gradients(run, inputs, 1)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(300, 64, generator=generator).bfloat16().double()
    exact = [t.double().requires_grad_() for t in inputs]
    wanted = torch.autograd.grad(run(*exact), exact[1:], grad)
    assert max(relative_error(m, e) for m, e in zip(mine, wanted)) < 1e-6


def test_frozen_parts_get_no_gradient(kernel_set):
    x, weight = random(5, 16), random(12, 16)
    a, b = random(4, 16).requires_grad_(), random(12, 4)
    lora_linear(x, weight, None, [LowRank(a, b, 1.0, 0.1, 0)]).sum().backward()
    assert a.grad is not None and x.grad is None and b.grad is None and weight.grad is None
    assert torch.equal(lora_linear(x, weight, None, []), functional.linear(x, weight))


def test_lora_linear_names_the_adapter_that_does_not_fit():
    with pytest.raises(UsageError, match=r"adapter 1: A \(4, 15\)"):
        good, bad = LowRank(random(4, 16), random(12, 4), 1.0), LowRank(random(4, 15), random(12, 4), 1.0)
        lora_linear(random(5, 16), random(12, 16), None, [good, bad])


@given(
    rows=st.sampled_from([0, 1, 2, 5, 64, 65, 150]),
    vocabulary=st.sampled_from([2, 16, 50, 301]),  # of one token every loss and gradient is zero
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "label_smoothing": st.just(0.1),
            "softcap": st.just(4.0),
            "logit_scale": st.just(0.5),
            "z_loss": st.just(0.01),
        },
    ),
    trained=st.booleans(),
    chunk=st.sampled_from([None, 1, 64]),
    dtype=DTYPES,
)
@FEW
def test_linear_cross_entropy(kernel_set, rows, vocabulary, ignored, options, trained, chunk, dtype):
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < ignored] = -100
    hidden = random(rows, 24, dtype=dtype)
    weight, bias = random(vocabulary, 24, dtype=dtype) / 10, random(vocabulary, dtype=dtype) / 4

    def ours(hidden: Tensor, *head: Tensor) -> Tensor:
        w, b = head or (weight.to(hidden.dtype), bias.to(hidden.dtype))
        return kernels.linear_cross_entropy(hidden, w, targets, b, chunk, **options)

    def plain(hidden: Tensor, *head: Tensor) -> Tensor:
        w, b = head or (weight.to(hidden.dtype), bias.to(hidden.dtype))
        return cross_entropy_reference(hidden, w, targets, b, **options)

    # Gradients of logits that cancel (a vocabulary of one token) are small beside the logits' rounding.
    check(ours, plain, [hidden, weight, bias] if trained else [hidden], float32_error=2e-5, factor=1.5, slack=3)
    if rows and ignored == 1.0:
        assert ours(hidden).eq(0).all()


def test_cross_entropy_is_that_of_pytorch(kernel_set):
    hidden, weight, targets = random(9, 16), random(40, 16), torch.arange(9)
    for smoothing in (0.0, 0.2):
        theirs = functional.cross_entropy(hidden @ weight.t(), targets, reduction="none", label_smoothing=smoothing)
        mine = kernels.linear_cross_entropy(hidden, weight, targets, label_smoothing=smoothing)
        assert torch.allclose(mine, theirs, atol=1e-5)
    logps = kernels.linear_logprob(hidden, weight, targets)
    assert torch.allclose(logps, (hidden @ weight.t()).log_softmax(-1)[torch.arange(9), targets], atol=1e-5)


def test_each_row_has_a_gradient_of_its_own(kernel_set):
    hidden, weight, targets = random(6, 8).requires_grad_(), random(11, 8), torch.arange(6)
    losses = kernels.linear_cross_entropy(hidden, weight, targets)
    (grad,) = torch.autograd.grad(losses, hidden, torch.tensor([0.0, 1, 0, -2, 0, 0]))
    assert grad.abs().sum(1).ne(0).tolist() == [False, True, False, True, False, False]
    exact = hidden.detach().double().requires_grad_()
    cross_entropy_reference(exact, weight.double(), targets).mul(torch.tensor([0.0, 1, 0, -2, 0, 0])).sum().backward()
    assert relative_error(grad, exact.grad) < 1e-5


def test_targets_outside_of_the_vocabulary_are_refused(kernel_set):
    with pytest.raises(UsageError, match="targets must be below 11"):
        kernels.linear_cross_entropy(random(2, 8), random(11, 8), torch.tensor([1, 11]))
