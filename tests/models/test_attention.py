"""Segments are taken from a mask exactly where they say the same as the mask."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from smidgen.models.attention import NAMES, Segments, segment_offsets
from tests.conftest import tiny_llama

CONFIG: Any = tiny_llama().config


def mask_of(make: Any, implementation: str, rows: int, length: int, **inputs: Any) -> Any:
    CONFIG._attn_implementation, CONFIG.sliding_window = implementation, 4
    inputs = {"attention_mask": None, "past_key_values": None, "position_ids": None} | inputs
    return make(config=CONFIG, inputs_embeds=torch.zeros(rows, length, 8), **inputs)


def pairs(segments: Segments, rows: int, length: int) -> Tensor:
    """(B, 1, T, T): who sees whom within each row, as plainly as it can be written."""
    seen = torch.zeros(rows * length, rows * length, dtype=torch.bool)
    bounds = segments.offsets.tolist()
    for start, end in pairwise(bounds):
        for query in range(start, end):
            first = start if segments.window is None else max(start, query - segments.window + 1)
            seen[query, first : query + 1] = True
    blocks = [seen[i * length : (i + 1) * length, i * length : (i + 1) * length] for i in range(rows)]
    assert sum(block.sum() for block in blocks) == seen.sum()  # no one sees another row
    return torch.stack(blocks)[:, None]


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    sliding=st.booleans(),
)
def test_packed_rows(lengths, sliding):
    make = create_sliding_window_causal_mask if sliding else create_causal_mask
    length = max(map(sum, lengths))
    filled = [[*row, length - sum(row)] for row in lengths]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in filled])
    rows = len(lengths)
    ours = mask_of(make, NAMES["sdpa"], rows, length, position_ids=positions)
    theirs = mask_of(make, "sdpa", rows, length, position_ids=positions)
    whole = torch.ones(length, length, dtype=torch.bool).tril()
    if sliding:
        whole = whole.triu(-3)
    theirs = whole.expand(rows, 1, length, length) if theirs is None else theirs.expand(rows, 1, length, length)
    assert isinstance(ours, Segments) and torch.equal(pairs(ours, rows, length), theirs)


@given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3))
def test_padding_at_either_end_and_nowhere_else(mask):
    valid = torch.tensor(mask)
    rows = len(mask)
    ours = mask_of(create_causal_mask, NAMES["sdpa"], rows, 7, attention_mask=valid.long())
    one_run = all(len([x for i, x in enumerate(row) if x and (i == 0 or not row[i - 1])]) <= 1 for row in mask)
    assert isinstance(ours, Segments) == one_run
    theirs = torch.ones(7, 7, dtype=torch.bool).tril() & valid[:, None]  # (B, T, T)
    if one_run:
        assert torch.equal(pairs(ours, rows, 7)[:, 0][valid], theirs[valid])
        own = ours.own_mask()
        assert own is None or torch.equal(own.expand(rows, 1, 7, 7)[:, 0][valid], theirs[valid])


def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return key <= query


@pytest.mark.parametrize(
    "other",
    [
        {"use_vmap": True},
        {"q_length": 4},
        {"q_offset": 2},
        {"q_offset": torch.tensor(2)},
        {"attention_mask": torch.ones(2, 12, dtype=torch.bool)},
        {"device": "meta"},
        {"mask_function": lambda row, head, query, key: query >= 0},  # both ways
        {"mask_function": lambda row, head, query, key: (key <= query) | (key < 3)},  # a prefix
        {"mask_function": lambda row, head, query, key: (key <= query) & (key // 2 != 1)},
        {"mask_function": lambda row, head, query, key: (key <= query) & (query - key < 6)},  # a window nobody told
    ],
)
def test_other_masks_are_not_taken_for_segments(other):
    plain = {"batch_size": 2, "q_length": 10, "kv_length": 10, "mask_function": causal}
    offsets = segment_offsets(**plain)
    assert offsets is not None and offsets.tolist() == [0, 10, 20]
    assert segment_offsets(**plain | other) is None


def test_chunks_are_segments():
    function = masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    offsets = segment_offsets(2, 10, 10, function, local_size=4)
    assert offsets is not None and offsets.tolist() == [0, 4, 8, 10, 14, 18, 20]
