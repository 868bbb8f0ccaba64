import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.data.packing import IGNORED, epoch_plan, micro_batches
from smidgen.data.prepare import RowStore
from smidgen.data.tokenise import Piece
from smidgen.errors import DataError


def make_rows(lengths, seed=0):
    random = np.random.default_rng(seed)
    pieces = []
    for line, length in enumerate(lengths, 1):
        first = int(random.integers(0, length))
        pieces.append(Piece(random.integers(1, 40, length).tolist(), [(first, length)], line, 0))
    store = RowStore()
    store.add(0, pieces)
    return store.rows(["d.jsonl"])


lengths = st.lists(st.integers(2, 60), min_size=1, max_size=120)


@settings(max_examples=80, deadline=None)
@given(
    lengths=lengths, batch=st.integers(1, 20), seed=st.integers(0, 99), epoch=st.integers(0, 3), grouped=st.booleans()
)
def test_an_epoch_holds_every_row_once_and_starts_with_the_longest(lengths, batch, seed, epoch, grouped):
    plan = epoch_plan(lengths, batch, seed=seed, epoch=epoch, grouped=grouped)
    assert sorted(index for update in plan for index in update) == list(range(len(lengths)))
    assert [len(update) for update in plan[:-1]] == [batch] * (len(plan) - 1)
    assert len(plan) == -(-len(lengths) // batch)
    if epoch == 0 and len(plan) > 1:
        assert max(lengths) == max(lengths[index] for index in plan[0])
    np.random.seed(epoch)  # the plan depends on its arguments alone
    assert plan == epoch_plan(np.array(lengths), batch, seed=seed, epoch=epoch, grouped=grouped)


def test_epochs_and_seeds_differ():
    plans = [epoch_plan(range(2, 200), 8, seed=seed, epoch=epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for index, one in enumerate(plans) for other in plans[:index])


@settings(max_examples=80, deadline=None)
@given(lengths=lengths, budget=st.integers(60, 300), packing=st.booleans())
def test_batches_hold_each_row_once_within_the_budget(lengths, budget, packing):
    rows = make_rows(lengths)
    batches = micro_batches(rows, range(len(rows)), token_budget=budget, packing=packing, pad_id=0)
    assert sorted(index for batch in batches for index in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.input_ids.numel() <= budget
        assert batch.supervised == int((batch.labels != IGNORED).sum()) == rows.supervised_counts[batch.rows].sum()
        if packing:
            check_packed(batch, rows)
        else:
            check_padded(batch, rows)


def check_packed(batch, rows):
    assert batch.attention_mask is None and batch.input_ids.shape[0] == 1
    at = 0
    for index in batch.rows:
        row = rows[index]
        part = slice(at, at + len(row.input_ids))
        at = part.stop
        assert batch.input_ids[0, part].tolist() == row.input_ids.tolist()
        assert batch.position_ids[0, part].tolist() == list(range(len(row.input_ids)))
        check_labels(batch.labels[0, part], row)
    assert at == batch.input_ids.shape[1]


def check_padded(batch, rows):
    assert batch.position_ids is None
    for place, index in enumerate(batch.rows):
        row = rows[index]
        length = len(row.input_ids)
        assert batch.input_ids[place, :length].tolist() == row.input_ids.tolist()
        assert (batch.labels[place, length:] == IGNORED).all()
        check_labels(batch.labels[place, :length], row)
        if batch.attention_mask is None:
            assert length == batch.input_ids.shape[1]
        else:
            assert batch.attention_mask[place].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)


def check_labels(labels, row):
    expected = [
        int(token) if learned else IGNORED for token, learned in zip(row.input_ids, row.supervised, strict=True)
    ]
    assert labels.tolist() == [IGNORED, *expected[1:]]


def test_padding_and_packing_waste_little():
    random = np.random.default_rng(0)
    rows = make_rows(np.clip(random.lognormal(5, 0.7, 1000), 10, 1024).astype(int))
    total = rows.lengths.sum()
    for packing, most in ((False, 1.03), (True, 1.0)):
        spent = sum(
            batch.input_ids.numel()
            for update in epoch_plan(rows.lengths, 16, seed=1, epoch=0)
            for batch in micro_batches(rows, update, token_budget=4096, packing=packing, pad_id=0)
        )
        assert spent <= most * total


def test_best_fit_fills_the_fullest_that_has_room():
    rows = make_rows([6, 5, 4, 3, 2])
    batches = micro_batches(rows, range(5), token_budget=10, packing=True, pad_id=0)
    assert [batch.rows for batch in batches] == [[0, 2], [1, 3, 4]]


def test_a_row_longer_than_the_budget_is_refused():
    with pytest.raises(DataError, match=r"d\.jsonl:2: the row has 9 tokens, more than the 8 computed at once"):
        micro_batches(make_rows([3, 9]), [0, 1], token_budget=8, packing=False, pad_id=0)


def test_a_batch_moves_with_its_tensors():
    batch = micro_batches(make_rows([3, 4]), [0, 1], token_budget=8, packing=True, pad_id=0)[0]
    moved = batch.to("meta")
    assert moved.input_ids.device == moved.position_ids.device == torch.device("meta")
    assert (moved.attention_mask, moved.rows, moved.supervised) == (None, batch.rows, batch.supervised)
