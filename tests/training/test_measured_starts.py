"""Runs whose adapter starts from the training data, or from the base's own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smidgen.data.packing import epoch_plan
from smidgen.errors import RecipeError, UsageError
from smidgen.recipe import load_recipe
from smidgen.training import run
from smidgen.training.setup import make_trainable, prepare
from tests.training.conftest import write_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))


def carry_out(path: Path, *overrides: str, **options):
    lines: list[str] = []
    recipe, _ = load_recipe(path, overrides)
    return run.train(recipe, say=lines.append, **options), lines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init", "told", "more"),
    [
        ("corda", "start: corda from 2 batches for 14 of 14 linear layers; ", []),
        pytest.param("eva", "start: eva from 2 batches for ", [], marks=pytest.mark.slow),
        pytest.param("lora_ga", "start: lora_ga from 2 batches for 14 of 14", [], marks=pytest.mark.slow),
        pytest.param("loftq", "start: loftq for 14 of 14", ["quantize=nf4"], marks=pytest.mark.slow),
    ],
)
def test_a_run_computes_the_start_and_proves_what_it_saved(tmp_path, init, told, more):
    recipe = write_recipe(tmp_path, save_steps=6, learning_rate=5e-3)
    settings = [f"adapter.init_lora_weights={init}", "adapter.init_batches=2", *more]
    proof, lines = carry_out(recipe, *settings)
    assert proof.passed, proof.lines()
    assert any(line.startswith(told) for line in lines)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "run" / "checkpoints" / "step-12").rename(tmp_path / "step-12")
    proof, _ = carry_out(recipe, *settings, resume=True)
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert proof.passed and all((saved[key] == again[key]).all() for key in saved)


def test_a_run_scores_its_data_for_a_sparse_mask(tmp_path):
    settings = ["adapter={method: shira, r: 2, mask_type: fisher, init_batches: 3}", "data.packing=false"]
    recipe, _ = load_recipe(write_recipe(tmp_path, micro_batch_tokens=8), settings)
    told: list[str] = []
    one = prepare(recipe, None, told.append)
    updates = epoch_plan(one.data.train.lengths, 8, seed=recipe.seed, epoch=0, grouped=False)
    batches = one.objective.collate(one.data.train, updates[0], one.how)[:3]
    weight = one.model.model.layers[0].self_attn.q_proj.weight
    fisher = torch.zeros_like(weight)
    for batch in batches:
        loss = one.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        fisher += torch.autograd.grad(loss, weight)[0].square()
    make_trainable(one, told.append)
    assert "mask: fisher from 3 batches" in told
    rows, columns = one.model.model.layers[0].self_attn.q_proj.adapters["default"].shira_indices.long()
    chosen = rows * weight.shape[1] + columns
    assert set(chosen.tolist()) == set(fisher.flatten().topk(len(chosen)).indices.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["gradient", "fisher"])
def test_a_sparse_run_is_proved_and_resumed(tmp_path, mask):
    recipe = write_recipe(tmp_path, save_steps=6, learning_rate=5e-3)
    settings = [f"adapter={{method: shira, r: 2, mask_type: {mask}}}"]
    proof, _ = carry_out(recipe, *settings)
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "run" / "checkpoints" / "step-12").rename(tmp_path / "step-12")
    again, _ = carry_out(recipe, *settings, resume=True)
    assert proof.passed and again.passed, proof.lines()
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all((saved[key] == found[key]).all() for key in saved)


def test_what_a_run_cannot_keep_or_use_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    with pytest.raises(UsageError, match="loftq_iter: more than 1 stores the base anew"):
        carry_out(recipe, "quantize=nf4", "adapter.init_lora_weights=loftq", "adapter.loftq_config={loftq_iter: 2}")
    with pytest.raises(RecipeError, match="eva_config: has no effect without 'init_lora_weights: eva'; add that"):
        load_recipe(recipe, ["adapter.eva_config={rho: 1.5}"])
