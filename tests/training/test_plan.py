"""The forecast against what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smidgen.training.memory import held
from smidgen.training.objectives import Collating, Objective
from smidgen.training.plan import LiveBytes, choose_budget, forecast, probe
from tests.conftest import tiny_gpt2, tiny_llama
from tests.training.conftest import TRAIN, make_rows, tiny_lora

ROWS = make_rows([60] * 32, prompt=10)


def test_live_bytes_counts_what_lives_at_the_peak():
    with LiveBytes(vocabulary=10) as live:
        first = torch.zeros(1000)  # 4,000 bytes
        second = first * 2  # 8,000
        del first  # 4,000
        logits = torch.zeros(50, 10)  # 2,000 of logits
        third = second.view(10, 100)  # a view: nothing
        fourth = third + 1  # 8,000 and 2,000: the peak
        del second, third, fourth
        torch.zeros(500)
    assert live.peak == (8000, 2000)
    assert logits.shape == (50, 10)


@pytest.mark.parametrize("make", [tiny_lora, tiny_llama, tiny_gpt2])
def test_the_forecast_is_near_the_measured_peak(make):
    """The probe sees 512 tokens; the micro-batches of the run are more than three times as large."""
    model = make().train()
    how = Collating(32 * 60, False, 0)
    taken = probe(model, Objective(), ROWS, how, None)
    found = forecast(model, taken, ROWS, how, replace(TRAIN, batch_size=32), updates=1)
    assert taken.tokens < 512 and found.micro_batch_tokens == 32 * 60
    (batch,) = Objective().collate(ROWS, range(32), how)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes(48) as live:
        Objective().loss(model, batch)[0].sum().backward()
    assert found.activations + found.logits == pytest.approx(sum(live.peak), rel=0.15)


def test_the_forecast_counts_parameters_gradients_and_moments():
    model = tiny_lora()
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    trained, steps = sum(sizes), 4 * len(sizes)  # each matrix counts its steps in a float32
    how = Collating(256, False, 0)
    taken = probe(model, Objective(), ROWS, how, None)
    found = forecast(model, taken, ROWS, how, replace(TRAIN, batch_size=8), updates=4)
    assert (found.trained, found.gradients, found.optimizer) == (4 * trained, 4 * trained, 8 * trained + steps)
    frozen = [*(p for p in model.parameters() if not p.requires_grad), *model.buffers()]
    assert found.weights == sum(tensor.nbytes for tensor in frozen)
    assert found.seconds == pytest.approx(taken.seconds / taken.tokens * 60 * 8 * 4)


def test_a_probe_leaves_gradients_and_random_generators_alone():
    model = tiny_lora(dropout=0.5)
    torch.manual_seed(5)
    probe(model, Objective(), ROWS, Collating(256, False, 0), None)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_the_forecast_counts_all_that_the_process_holds():
    model = tiny_lora()
    how = Collating(256, False, 0)
    before = held(torch.device("cpu"))
    taken = probe(model, Objective(), ROWS, how, None)
    found = forecast(model, taken, ROWS, how, TRAIN, updates=4)
    assert taken.held == pytest.approx(before, rel=0.2)
    assert found.loaded == found.weights + found.trained + found.libraries == taken.held
    assert found.peak == found.loaded + found.missing == sum(found.bytes().values())


def test_a_row_longer_than_the_probe_is_probed_whole():
    rows = make_rows([700, 30])
    model = tiny_llama(max_position_embeddings=1024)
    assert probe(model, Objective(), rows, Collating(1024, False, 0), None).tokens == 700


def test_the_budget_is_halved_until_it_fits(monkeypatch):
    model, train = tiny_lora(), replace(TRAIN, batch_size=32)
    how = Collating(1920, False, 0)
    taken = probe(model, Objective(), ROWS, how, None)
    whole = forecast(model, taken, ROWS, how, train, 1)
    monkeypatch.setattr("smidgen.training.plan.free_memory", lambda device: whole.missing // 2)
    told = "\n".join(replace(whole, free=whole.missing // 2).lines())
    assert "fits: no (needs" in told
    smaller = choose_budget(model, taken, ROWS, how, train, 1)
    assert 60 <= smaller.token_budget < 1920
    assert forecast(model, taken, ROWS, smaller, train, 1).fits
