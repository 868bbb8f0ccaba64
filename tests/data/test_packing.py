import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.data.packing import IGNORED, batch_of, epoch_plan, micro_batches
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
    left = batch.input_ids.shape[1] - at
    assert left < max(8, at / 16) and (batch.labels[0, at:] == IGNORED).all()
    assert batch.position_ids[0, at:].tolist() == list(range(left))


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
    for packing, most in ((False, 1.03), (True, 1.03)):
        spent = sum(
            batch.input_ids.numel()
            for update in epoch_plan(rows.lengths, 16, seed=1, epoch=0)
            for batch in micro_batches(rows, update, token_budget=4096, packing=packing, pad_id=0)
        )
        assert spent <= most * total


def test_packed_batches_are_of_few_lengths():
    random = np.random.default_rng(0)
    rows = make_rows(random.integers(10, 200, 2000))
    updates = epoch_plan(rows.lengths, 8, seed=1, epoch=0)
    found = {
        batch.input_ids.numel()
        for update in updates
        for batch in micro_batches(rows, update, token_budget=1024, packing=True, pad_id=0)
    }
    assert len(found) <= 16 * 4 < len(updates)  # from 64 to 1,024 tokens


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


begun = st.tuples(st.lists(st.integers(1, 3), max_size=12), st.lists(st.integers(4, 6), min_size=2, max_size=4))


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(begun, min_size=1, max_size=12))
def test_what_rows_begin_with_stands_once(parts):
    store = RowStore()
    store.add(0, [Piece(p + a, [(len(p), len(p + a))], line, 0) for line, (p, a) in enumerate(parts)])
    rows = store.rows(["d.jsonl"])
    plain, batch = (
        batch_of([*rows], range(len(rows)), packing=True, pad_id=0, sharing=sharing) for sharing in (False, True)
    )
    whole = batch.whole()
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(getattr(whole, name), getattr(plain, name))
    fewest = len({tuple(p[:end]) for p, _ in parts for end in range(1, len(p) + 1)}) + sum(len(a) for _, a in parts)
    if batch.branches is None:
        assert fewest > 0.95 * plain.input_ids.numel()
        return
    assert batch.input_ids.numel() == fewest < plain.input_ids.numel()
    assert batch.supervised == plain.supervised and batch.rows == plain.rows
    branches, values = batch.branches, torch.randn(plain.input_ids.numel(), 2, 3)
    out = torch.empty(fewest, 2, 3)
    branches.spread.summed(values, out)
    expected = torch.zeros_like(out).index_add_(0, branches.spread.tokens, values)
    torch.testing.assert_close(out, expected)
    assert torch.equal(branches.spread.tokens[branches.spread.kept], torch.arange(fewest))
    follows = branches.before >= 0
    assert torch.equal(batch.position_ids[0, branches.before[follows]] + 1, batch.position_ids[0, follows])
    assert (batch.position_ids[0, ~follows] == 0).all()
    learned = batch.labels[0] != IGNORED
    assert torch.equal(branches.row[learned], (plain.position_ids[0] == 0).cumsum(0)[plain.labels[0] != IGNORED] - 1)
