"""Token losses against full logits, for padded and packed batches."""

from __future__ import annotations

import pytest
import torch

from smidgen.data.packing import micro_batches
from smidgen.models.scores import keeps_rows_apart, row_indices, takes, token_losses
from tests.conftest import tiny_gpt2, tiny_llama
from tests.training.conftest import make_rows

ROWS = make_rows([9, 4, 6, 12], prompt=2)


def expected(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """The losses of each row, computed alone from all its logits."""
    found = {}
    for index, row in enumerate(ROWS):
        ids = torch.tensor(row.input_ids).long()[None]
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses = -logits[torch.arange(len(row.input_ids) - 1), ids[0, 1:]]
        found[index] = losses[torch.tensor(row.supervised)[1:]]
    return found


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_token_losses_equal_those_of_each_row_alone(make, packing):
    model = make()
    wanted = expected(model)
    found = {}
    for batch in micro_batches(ROWS, [0, 1, 2, 3], token_budget=100, packing=packing, pad_id=0):
        losses, rows = token_losses(model, batch)
        assert len(losses) == batch.supervised
        found |= {index: losses[rows == index] for index in batch.rows}
    for index, alone in wanted.items():
        torch.testing.assert_close(found[index], alone, atol=1e-5, rtol=1e-5)


def test_packed_loss_is_the_token_weighted_mean_of_the_parts():
    model = tiny_llama()
    parts = expected(model)
    (batch,) = micro_batches(ROWS, [0, 1], token_budget=100, packing=True, pad_id=0)
    mean = (parts[0].sum() + parts[1].sum()) / (len(parts[0]) + len(parts[1]))
    torch.testing.assert_close(token_losses(model, batch)[0].mean(), mean, atol=1e-5, rtol=1e-5)


def test_logits_are_computed_at_supervised_positions_only():
    model = tiny_llama()
    widths = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[:2]))
    (batch,) = micro_batches(ROWS, [0, 1, 2, 3], token_budget=100, packing=True, pad_id=0)
    token_losses(model, batch)
    assert widths == [(1, batch.supervised)]


def test_a_model_that_takes_no_positions_to_keep_gets_all_logits():
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, use_cache=None, attention_mask=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    model = tiny_llama()
    batch = micro_batches(ROWS, [0, 1], token_budget=100, packing=False, pad_id=0)[0]
    assert takes(model, "logits_to_keep") and not takes(Plain(model), "logits_to_keep")
    torch.testing.assert_close(token_losses(Plain(model), batch)[0], token_losses(model, batch)[0])


def test_row_indices_of_a_packed_batch():
    (batch,) = micro_batches(ROWS, [1, 2], token_budget=100, packing=True, pad_id=0)
    assert row_indices(batch).tolist() == [[2] * 6 + [1] * 4 + [-1] * 6]  # padding at the end


def test_a_model_that_mixes_packed_rows_is_found_out():
    class Leaking(torch.nn.Module):
        """Forgets where rows begin, as a model does that keeps a running state."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.get_input_embeddings = inner.get_input_embeddings

        def forward(self, input_ids, position_ids=None, use_cache=None, logits_to_keep=0):
            return self.inner(input_ids=input_ids, logits_to_keep=logits_to_keep)

    model = tiny_llama()
    assert keeps_rows_apart(model)
    assert not keeps_rows_apart(Leaking(model))


def test_loss_of_a_batch_ignores_padding_tokens_of_any_value():
    model = tiny_llama()
    batches = [micro_batches(ROWS, [0, 1], token_budget=100, packing=False, pad_id=pad)[0] for pad in (0, 7)]
    first, second = (token_losses(model, batch)[0] for batch in batches)
    assert torch.equal(first, second)
