"""Dropout, norms, gated activations and rotary embedding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from smidgen import kernels
from smidgen.errors import UsageError
from smidgen.kernels.dropout import dropped, scaled_mask
from smidgen.kernels.norms import rms_norm_reference
from smidgen.kernels.rope import rope_reference
from tests.kernels.conftest import check, random

SHAPES = given(
    rows=st.sampled_from([0, 1, 2, 7, 33]),
    width=st.sampled_from([1, 2, 15, 16, 17, 31, 48, 65, 576]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SHAPES
@FEW
def test_dropout_equals_its_definition_to_the_bit(kernel_set, rows, width, dtype, seed):
    x = random(rows, 3, width, dtype=dtype).requires_grad_()
    y = kernels.dropout(x, 0.3, seed)
    assert torch.equal(y, (x * scaled_mask(x.shape, 0.3, seed)).to(dtype))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad, scaled_mask(x.shape, 0.3, seed).to(dtype))
    total = torch.ones_like(x).detach()
    assert dropped(x.detach(), 0.3, seed, add_to=total) is total
    assert torch.allclose(total, y + 1, rtol=1e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


def test_dropout_is_random():
    """Rate and independence of neighbours, rows and seeds, each within five standard deviations."""
    p, n = 0.05, 2048 * 576
    drops = [(scaled_mask((2048, 576), p, seed) == 0).double() for seed in (0, 1, 2**40, -1)]
    sigma = (p * (1 - p)) ** 0.5
    for drop in drops:
        assert abs(drop.mean() - p) < 5 * sigma / n**0.5
        for axis, size in ((0, 2048), (1, 576)):  # shares of each column and of each row scatter as they should
            assert drop.mean(axis).std() == pytest.approx(sigma / size**0.5, rel=0.15)
        for a, b in ((drop[:, 1:], drop[:, :-1]), (drop[1:], drop[:-1]), (drop[:, 16:], drop[:, :-16])):
            assert abs(((a - p) * (b - p)).mean() / sigma**2) < 5 / n**0.5
    for i, a in enumerate(drops):
        for b in drops[:i]:
            assert abs(((a - p) * (b - p)).mean() / sigma**2) < 5 / n**0.5
    values, counts = drops[0].view(-1, 8).sum(1).unique(return_counts=True)  # runs of 8 are binomial
    for k, count in zip(values.long().tolist(), counts.tolist()):
        binomial = torch.distributions.Binomial(8, torch.tensor(p, dtype=torch.float64)).log_prob(
            torch.tensor(float(k))
        )
        expected = float(binomial.exp()) * n / 8
        assert abs(count - expected) < 5 * expected**0.5 + 1


def test_dropout_does_not_depend_on_threads(kernel_set):
    x, threads = random(300, 100), torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(kernels.dropout(x, 0.5, 9))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answers[0], answer) for answer in answers)


def test_dropout_refuses_a_wrong_share():
    with pytest.raises(UsageError, match=r"p must be from 0 to below 1, got 1\.5"):
        kernels.dropout(random(2, 2), 1.5, 0)


def test_dropout_of_nothing_is_nothing():
    x = random(2, 2)
    assert kernels.dropout(x, 0.0, 3) is x


@SHAPES
@FEW
@pytest.mark.parametrize(("offset", "cast_first"), [(0.0, True), (1.0, False), (0.0, False)])
def test_rms_norm(kernel_set, offset, cast_first, rows, width, dtype, seed):
    def ours(x, weight):
        return kernels.rms_norm(x, weight, 1e-5, offset, cast_first)

    def plain(x, weight):
        return rms_norm_reference(x, weight, 1e-5, offset, cast_first)

    width = width + 1  # of one number the gradient is zero
    check(ours, plain, [random(rows, 2, width, dtype=dtype, seed=seed), random(width, dtype=dtype)], factor=1.3)


@SHAPES
@FEW
def test_add_rms_norm(kernel_set, rows, width, dtype, seed):
    def plain(x, residual, weight):
        total = x + residual
        return total, rms_norm_reference(total, weight, 1e-6)

    width = width + 1
    x, residual = random(rows, width, dtype=dtype, seed=seed), random(rows, width, dtype=dtype, seed=seed + 1)
    inputs = [x, residual, random(width, dtype=dtype)]
    # Two roundings: of the sum, and of what is made of it.
    check(lambda x, r, w: kernels.add_rms_norm(x, r, w, 1e-6), plain, inputs, factor=1.3, slack=2.0)


@SHAPES
@FEW
def test_layer_norm(kernel_set, rows, width, dtype, seed):
    width = width + 2  # of one or two numbers the gradient is zero
    inputs = [
        random(rows, width, dtype=dtype, seed=seed),
        random(width, dtype=dtype),
        random(width, dtype=dtype, seed=9),
    ]
    check(
        lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-5),
        inputs,
        float32_error=2e-5,  # two almost equal numbers: their difference is small beside them
        factor=1.3,
        slack=2,
    )


def test_norms_are_those_of_transformers():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        x, weight = random(5, 64, dtype=dtype), random(64, dtype=dtype)
        for module, options in (
            (LlamaRMSNorm(64, 1e-6), {}),
            (GemmaRMSNorm(64, 1e-6), {"offset": 1.0, "cast_first": False}),
        ):
            module.weight.data = weight
            assert torch.allclose(
                kernels.rms_norm(x, weight, 1e-6, **options),
                module(x),
                rtol=8e-3 if dtype == torch.bfloat16 else 1e-6,
                atol=1e-6,
            )


@SHAPES
@FEW
@pytest.mark.parametrize("name", ["swiglu", "geglu", "geglu_tanh"])
def test_gated(kernel_set, name, rows, width, dtype, seed):
    both = random(rows, 2 * width, dtype=dtype, seed=seed) * 3

    def ours(both):
        gate, up = both.chunk(2, dim=-1)  # rows that are not dense
        return kernels.swiglu(gate, up) if name == "swiglu" else kernels.geglu(gate, up, tanh=name == "geglu_tanh")

    def plain(both):
        gate, up = both.chunk(2, dim=-1)
        if name == "swiglu":
            return functional.silu(gate) * up
        return functional.gelu(gate, approximate="tanh" if name == "geglu_tanh" else "none") * up

    check(ours, plain, [both])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_at_the_ends(kernel_set, dtype):
    gate = torch.tensor([-1e4, -200, -88, -30, -9, -1e-6, 0, 1e-6, 9, 88, 200, 1e4], dtype=dtype)
    for ours, plain in ((kernels.swiglu, functional.silu), (kernels.geglu, functional.gelu)):
        answer, exact = ours(gate, torch.ones_like(gate)), plain(gate.double())
        assert torch.allclose(answer.double(), exact, rtol=5e-3 if dtype == torch.bfloat16 else 2e-6, atol=1e-12)
    nan = torch.full((3,), float("nan"), dtype=dtype)
    assert kernels.swiglu(nan, nan).isnan().all()


@given(
    tokens=st.sampled_from([0, 1, 5, 40]),
    heads=st.integers(1, 3),
    pairs=st.sampled_from([1, 4, 8, 16, 20]),
    rest=st.sampled_from([0, 3, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    interleaved=st.booleans(),
)
@FEW
def test_rope(kernel_set, tokens, heads, pairs, rest, dtype, interleaved):
    angles = random(2, tokens, pairs) * 3
    x = random(2, tokens, heads + 2, 2 * pairs + rest, dtype=dtype)

    def ours(x):
        return kernels.rope(x[:, :, :heads], angles.cos(), angles.sin(), interleaved)  # heads of a wider projection

    def plain(x):
        return rope_reference(x[:, :, :heads], angles.cos(), angles.sin(), interleaved)

    check(ours, plain, [x])


def test_rope_is_that_of_transformers(kernel_set):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = random(2, 7, 8)
    cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
    x = random(2, 7, 3, 16)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    assert torch.allclose(kernels.rope(x, cos[..., :8], sin[..., :8]), theirs.transpose(1, 2), atol=1e-6)
