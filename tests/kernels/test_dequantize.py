"""Stored weights made dense: every instruction set against plain PyTorch and float64, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from smidgen.errors import UsageError
from smidgen.kernels.block import _map, _tensors
from smidgen.kernels.dequantize import BOOKS, Kind, Nested, Packed, dense, dense_reference

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = (torch.float32, torch.bfloat16)


def stored(
    kind: Kind,
    rows: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
    block_size: int = 64,
    double: bool = False,
    seed: int = 0,
) -> Packed:
    """Random codes and scales."""
    draw = torch.Generator().manual_seed(seed)

    def bytes_(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=draw)

    if kind == "int8":
        codes, block_size = bytes_(rows * columns).view(torch.int8).view(rows, columns), columns
    else:
        codes = bytes_((rows * columns + 1) // 2)
    blocks = -(-rows * columns // block_size)
    nested = None
    scales = torch.rand(blocks, generator=draw) * 0.1
    if double and kind != "int8":
        book = torch.randn(256, generator=draw).sort().values
        nested = Nested(torch.rand(-(-blocks // 256), generator=draw) * 0.01, book, 0.0625)
        scales = bytes_(blocks)
    return Packed(kind, (rows, columns), dtype, codes, scales, block_size, nested)


def exact(packed: Packed) -> Tensor:
    """The definition, in float64 but for the roundings it has."""
    rows, columns = packed.shape
    if packed.nested is None:
        scales = packed.scales.double()
    else:
        wide = packed.nested.scales.double().repeat_interleave(256)[: len(packed.scales)]
        scales = (packed.nested.book.double()[packed.scales.long()] * wide).float().double() + packed.nested.offset
        scales = scales.float().double()
    if packed.kind == "int8":
        step = torch.tensor(7.874015718698502e-3).double()
        weight = (packed.codes.double() * scales[:, None]).float().double() * step
    else:
        codes = torch.stack([packed.codes // 16, packed.codes % 16], 1).view(-1)[: rows * columns].long()
        values = torch.tensor(BOOKS[packed.kind]).double()[codes]
        weight = values * scales[torch.arange(rows * columns) // packed.block_size]
    return weight.float().to(packed.dtype).view(rows, columns)


@given(
    kind=st.sampled_from(["nf4", "fp4", "int8"]),
    rows=st.sampled_from([1, 2, 3, 7, 33, 200]),
    columns=st.sampled_from([1, 2, 15, 31, 64, 65, 96, 576]),
    dtype=st.sampled_from(DTYPES),
    block_size=st.sampled_from([32, 64, 128, 4096]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
@FEW
def test_dense_equals_its_definition_to_the_bit(kernel_set, kind, rows, columns, dtype, block_size, double, seed):
    packed = stored(kind, rows, columns, dtype, block_size, double, seed)
    assert torch.equal(dense(packed), exact(packed))


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_float16_and_the_reference_follow_the_definition(kind):
    for dtype in (torch.float16, *DTYPES):
        packed = stored(kind, 5, 33, dtype, double=True)
        assert torch.equal(dense_reference(packed), exact(packed))
        assert torch.equal(dense(packed), exact(packed))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_go_side_by_side_into_one_matrix(kernel_set, kind):
    parts = [stored(kind, rows, 96, torch.bfloat16, seed=rows) for rows in (64, 32, 33)]
    tile = torch.full((64 + 32 + 33 + 1, 96), 7.0, dtype=torch.bfloat16)
    first = 0
    for part in parts:
        out = tile[first : first + part.shape[0]]
        assert dense(part, out) is out
        first += part.shape[0]
    assert torch.equal(tile[:-1], torch.cat([exact(part) for part in parts]))
    assert (tile[-1] == 7).all()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_number_of_threads_does_not_matter(kernel_set, kind):
    packed, threads = stored(kind, 300, 577, torch.bfloat16, double=True), torch.get_num_threads()
    try:
        answers = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            answers.append(dense(packed))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(answer, exact(packed)) for answer in answers)


def test_no_memory_is_taken_beside_the_result(kernel_set):
    if kernel_set == "reference":
        pytest.skip("plain PyTorch makes a float32 copy")
    packed = stored("nf4", 256, 512, torch.bfloat16, double=True)
    out = torch.empty(256, 512, dtype=torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        dense(packed, out)
    assert sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages()) < 1024


def test_it_compiles_in_one_piece():
    packed = stored("nf4", 8, 65, double=True)
    compiled = torch.compile(lambda codes: dense(packed._replace(codes=codes)) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(packed.codes), exact(packed) * 2)


def test_a_stored_weight_is_a_branch_of_a_tree_of_tuples():
    packed = stored("nf4", 8, 64, double=True)
    assert len(_tensors((packed, None))) == 4
    copy = _map((packed, None), torch.clone)[0]
    assert isinstance(copy, Packed)
    assert isinstance(copy.nested, Nested)
    assert copy.shape == (8, 64)
    assert torch.equal(dense(copy), exact(packed))


def test_what_does_not_fit_is_refused():
    packed = stored("nf4", 8, 64)
    for out in (torch.empty(8, 65), torch.empty(8, 64, dtype=torch.bfloat16), torch.empty(64, 8).t()):
        with pytest.raises(UsageError, match="out must be contiguous"):
            dense(packed, out)
    cast = packed._replace(scales=packed.scales.bfloat16())
    with pytest.raises(UsageError, match=r"scales .* must be 8 numbers of torch\.float32, .* must not be cast"):
        dense(cast)
    with pytest.raises(UsageError, match=r"codes .* must be 256 numbers"):
        dense(packed._replace(codes=packed.codes[1:]))
