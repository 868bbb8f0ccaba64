"""Codes and scales against bitsandbytes, to the bit, and against their definitions."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from smidgen.errors import ModelError, UsageError
from smidgen.kernels.dequantize import BOOKS
from smidgen.quant import BLOCK_SIZES, KINDS, dense, quantize
from smidgen.quant.codes import dynamic_book
from tests.quant.conftest import DTYPES, weights

FOUR_BITS = ("nf4", "fp4")
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_nf4_is_made_of_quantiles_of_the_normal_distribution():
    """Eight steps of probability from the largest down to a half for what is positive, seven for what is negative."""

    def quantiles(count: int) -> list[float]:
        edges = torch.linspace(0.9677083, 0.5, count + 1)[:-1].double().tolist()
        return [NormalDist().inv_cdf(edge) for edge in edges]

    values = torch.tensor([*quantiles(8), 0.0, *(-value for value in quantiles(7))]).sort().values
    assert torch.equal(values / values.max(), torch.tensor(BOOKS["nf4"]))


def test_fp4_is_a_sign_two_bits_of_exponent_and_one_of_fraction():
    values = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
    assert torch.equal(torch.tensor(BOOKS["fp4"]), torch.tensor(values + [-v for v in values]) / 12)


def test_code_books_are_those_of_bitsandbytes(bnb):
    assert torch.equal(dynamic_book(), bnb.functional.create_dynamic_map())
    for kind in FOUR_BITS:
        assert torch.equal(torch.tensor(BOOKS[kind]), bnb.functional.get_4bit_type(kind, device="cpu"))


@given(
    kind=st.sampled_from(FOUR_BITS),
    rows=st.sampled_from([1, 2, 3, 8, 33, 130]),
    columns=st.sampled_from([1, 2, 15, 64, 96, 130, 576]),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
@FEW
def test_four_bits_are_those_of_bitsandbytes(bnb, kind, rows, columns, dtype, block_size, double, seed):
    weight = weights(rows, columns, dtype, seed)
    codes, state = bnb.functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double
    )
    packed = quantize(weight, kind, double=double, block_size=block_size)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.scales, state.absmax)
    assert packed.scales.dtype == state.absmax.dtype
    if double:
        assert packed.nested is not None
        assert torch.equal(packed.nested.scales, state.state2.absmax)
        assert torch.equal(packed.nested.book, state.state2.code)
        assert packed.nested.offset == state.offset.item()


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_many_chunks_are_those_of_bitsandbytes(bnb, kind):
    weight = weights(1025, 576, torch.bfloat16)
    codes, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    packed = quantize(weight, kind, double=True)
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.scales, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (1000, 576)])
def test_int8_is_that_of_bitsandbytes(bnb, dtype, rows, columns):
    weight = weights(rows, columns, dtype)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight)
    packed = quantize(weight, "int8")
    assert torch.equal(packed.codes, codes)
    assert torch.equal(packed.scales, scales)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_code_is_taken(kind):
    """In float64, of all codes; the scales are the largest magnitudes."""
    weight = weights(40, 96)
    packed = quantize(weight, kind)
    book = torch.tensor(BOOKS.get(kind, [i / 127 for i in range(-127, 128)]), dtype=torch.float64)
    blocks = weight.double().view(-1, packed.block_size)
    scales = blocks.abs().amax(1, keepdim=True)
    assert torch.equal(packed.scales.double(), scales[:, 0])
    nearest = (blocks[:, :, None] - scales[:, :, None] * book).abs().amin(-1)
    ours = (blocks - dense(packed).double().view(blocks.shape)).abs()
    assert (ours <= nearest + 1e-6 * scales).all()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made, in bytes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor._base is None and not func.is_view:
                self.size = max(self.size, tensor.nbytes)
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_working_memory_does_not_grow_with_the_weight(kind):
    weight = weights(4096, 1024, torch.bfloat16)
    with Largest() as largest:
        quantize(weight, kind, double=kind != "int8")
    stored = weight.numel() // (1 if kind == "int8" else 2)  # bytes of codes
    assert largest.size == stored
    with Largest() as largest:
        quantize(weight[:512], kind, double=kind != "int8")
    assert largest.size <= 2**20


def test_rows_may_be_spaced():
    weight = weights(64, 96)
    for kind in KINDS:
        ours, plain = quantize(weight.t(), kind), quantize(weight.t().contiguous(), kind)
        assert torch.equal(ours.codes, plain.codes)
        assert torch.equal(ours.scales, plain.scales)


def test_a_weight_of_zeros_stays_zero():
    for kind in KINDS:
        packed = quantize(torch.zeros(3, 65), kind)
        assert not dense(packed).any()
    assert not dense(quantize(torch.zeros(300, 64), "nf4", double=True)).any()


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(UsageError) as error:
        quantize(torch.zeros(3, dtype=torch.int64), "nf5", block_size=48)  # pyright: ignore[reportArgumentType]
    for part in ("did you mean 'nf4'", "block_size must be one of 32, 64", "torch.int64", "shape (3,)"):
        assert part in str(error.value)
    with pytest.raises(UsageError, match="no double quantisation"):
        quantize(torch.ones(2, 2), "int8", double=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, -1])
def test_a_weight_that_is_not_finite_is_refused(kind, value, place):
    weight = weights(5, 65)
    weight.view(-1)[place] = value
    with pytest.raises(ModelError, match=r"NaN or infinity.*load the model in the type"):
        quantize(weight, kind)
