from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from smidgen import kernels
from smidgen.errors import UsageError
from smidgen.kernels.attention import attention_reference
from tests.kernels.conftest import check, random, relative_error

FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def offsets_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 63, 64, 65, 130, 200]), max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([1, 8, 24, 40, 64, 80, 96, 128, 256]),
    window=st.sampled_from([None, 1, 7, 64, 100]),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@FEW
def test_attention(kernel_set, lengths, kv_heads, group, width, window, softcap, dtype):
    offsets = offsets_of(lengths)
    heads = kv_heads * group
    qkv = random(sum(lengths), heads + 2 * kv_heads, width, dtype=dtype)

    def parts(qkv):
        return qkv.split([heads, kv_heads, kv_heads], dim=1)  # views of one projection

    def ours(qkv):
        return kernels.attention(*parts(qkv), offsets, None, window, softcap)

    def plain(qkv):
        return attention_reference(*parts(qkv), offsets, width**-0.5, window, softcap)

    check(ours, plain, [qkv], float32_error=5e-6, factor=1.3, slack=2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_segments(kernel_set, dtype):
    """Long enough to be cut into two and four ranges of keys."""
    offsets = offsets_of([1100, 3, 2100])
    q, k, v = (random(3203, heads, 16, dtype=dtype, seed=heads) for heads in (2, 1, 1))
    for window in (None, 300):
        check(
            lambda q, k, v: kernels.attention(q, k, v, offsets, 0.3, window),  # noqa: B023
            lambda q, k, v: attention_reference(q, k, v, offsets, 0.3, window),  # noqa: B023
            [q, k, v],
            float32_error=5e-6,
        )


def test_it_is_the_attention_of_pytorch(kernel_set):
    q, k, v = random(2 * 40, 4, 16), random(2 * 40, 2, 16, seed=1), random(2 * 40, 2, 16, seed=2)
    ours, _ = kernels.attention(q, k, v, offsets_of([40, 40]))
    batch = [x.view(2, 40, -1, 16).transpose(1, 2) for x in (q, k, v)]
    theirs = functional.scaled_dot_product_attention(*batch, is_causal=True, enable_gqa=True)
    assert torch.allclose(ours.view(2, 40, 4, 16), theirs.transpose(1, 2), atol=1e-6)


def test_nothing_leaks_between_segments_or_from_the_future(kernel_set):
    offsets = offsets_of([70, 33])
    q, k, v = (random(103, 2, 32, seed=seed) for seed in range(3))
    whole, _ = kernels.attention(q, k, v, offsets)
    alone, _ = kernels.attention(q[70:], k[70:], v[70:], offsets_of([33]))
    assert torch.equal(whole[70:], alone)
    k[50:70], v[50:70] = 100, 1e30
    later, _ = kernels.attention(q, k, v, offsets)
    assert torch.equal(whole[:50], later[:50]) and torch.equal(whole[70:], later[70:])


def test_large_scores_stay_finite(kernel_set):
    q = random(130, 1, 16) * 300
    out, lse = kernels.attention(q, q, q, offsets_of([130]), 1.0)
    exact, exact_lse = attention_reference(q.double(), q.double(), q.double(), offsets_of([130]), 1.0)
    assert torch.allclose(out.double(), exact, rtol=1e-3, atol=1e-3) and torch.allclose(
        lse.double(), exact_lse, rtol=1e-6
    )


def test_the_number_of_threads_changes_no_bit(kernel_set):
    """Nor does a segment that is long enough to be cut into ranges of keys change anything."""
    if kernel_set == "reference":
        pytest.skip("PyTorch's own sums may depend on the number of threads")
    offsets, threads = offsets_of([1100, 200, 31]), torch.get_num_threads()
    qkv = random(1331, 4, 16)
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = qkv.clone().requires_grad_()
            out, _ = kernels.attention(leaf[:, :2], leaf[:, 2:3], leaf[:, 3:], offsets)
            out.square().sum().backward()
            answers.append((out.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for answer in answers[1:] for x, y in zip(answer, answers[0]))
    exact = qkv.double().requires_grad_()
    out, _ = attention_reference(exact[:, :2], exact[:, 2:3], exact[:, 3:], offsets, 0.25)
    out.square().sum().backward()
    assert relative_error(answers[0][1], exact.grad) < 5e-6


def test_wrong_shapes_are_told_at_once():
    q, k = random(5, 3, 8), random(5, 2, 8)
    with pytest.raises(UsageError) as error:
        kernels.attention(q, k, k, torch.tensor([0, 4]), -1.0, 0)
    for part in ("3 query heads are no multiple of 2", "rise from 0 to 5", "scale must be above 0", "window must be"):
        assert part in str(error.value)
