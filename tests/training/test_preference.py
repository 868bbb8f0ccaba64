"""Objectives that learn from preferences: what must not change the gradient, the reference, the start."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from smidgen import kernels
from smidgen.errors import TrainingStopped
from smidgen.losses.preference import LOSSES, PreferenceLoss
from smidgen.models import fuse
from smidgen.models.scores import shares_beginnings
from smidgen.training.loop import evaluate
from smidgen.training.objectives import Collating, Objective
from smidgen.training.preference import Kto, Preference
from smidgen.training.reference import precompute, prove_start
from tests.conftest import perturb, tiny_llama
from tests.training.conftest import make_labelled, make_loop, make_pairs, tiny_lora
from tests.training.test_loop import gradients

PAIRS = make_pairs(
    [(7, 12), (9, 6), (16, 10), (5, 8), (11, 11), (6, 14), (13, 7), (8, 9), (10, 15), (4, 6)],
    [3, 4, 5, 2, 6, 3, 4, 5, 6, 2],
)
LABELLED = make_labelled(PAIRS)
JOINED = ("aot", "aot_unpaired")  # they sort the pairs of a micro-batch


def objectives() -> dict:
    """Every objective, as its name and how it is made."""
    made = {name: lambda name=name: Preference(PreferenceLoss({name: 1.0})) for name in LOSSES if name not in JOINED}
    made["mixed"] = lambda: Preference(PreferenceLoss({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}), ld_alpha=0.5)
    made["js"] = lambda: Preference(PreferenceLoss({"hinge": 1.0}, divergence="js_divergence"))
    made["kto"] = lambda: Kto(desirable_weight=1.5)
    return made


def rows_of(objective):
    return LABELLED if isinstance(objective, Kto) else PAIRS


def moved():
    """A policy that is away from its reference, the base."""
    model = tiny_lora().double()
    perturb(model, scale=0.3)
    return model


@pytest.mark.parametrize("name", objectives())
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(tmp_path, name):
    make = objectives()[name]
    rows = rows_of(make())
    for update in (list(range(8)), [8, 9, 0]):
        numbers = set()
        whole = gradients(tmp_path / "w", moved(), 4096, False, update, rows, make())
        assert any(grad.abs().max() > 1e-4 for grad in whole.values())
        for budget, packing in ((32, False), (80, False), (32, True), (80, True), (4096, True)):
            numbers.add(len(make().collate(rows, update, Collating(budget, packing, 0))))
            cut = gradients(tmp_path / "c", moved(), budget, packing, update, rows, make())
            for key, grad in whole.items():
                torch.testing.assert_close(cut[key], grad, atol=1e-6, rtol=1e-6, msg=f"{name} {budget} {key}")
        assert len(numbers) > 1


@pytest.mark.parametrize("name", objectives())
def test_the_held_out_loss_does_not_depend_on_the_cut(tmp_path, name):
    make = objectives()[name]
    model, rows = moved(), rows_of(make())
    loop = make_loop(tiny_lora(), rows, tmp_path)
    found = [
        evaluate(model, make(), rows, Collating(budget, packing, 0), loop.accelerator)
        for budget, packing in ((32, False), (4096, True))
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert {"loss", "rewards/chosen", "rewards/rejected"} <= found[0].keys()


# ---- the reference ----


def start(model, as_base=True, objective=None):
    """A DPO objective that has seen the model as it starts."""
    objective = objective or Preference(PreferenceLoss({"sigmoid": 1.0}))
    objective.begin(model, as_base)
    return objective


def whole_batch(objective, rows=PAIRS):
    (batch,) = objective.collate(rows, range(len(rows)), Collating(4096, True, 0))
    return batch


@pytest.mark.parametrize("make", [Kto, lambda: Preference(PreferenceLoss({"ipo": 1.0}))], ids=["kto", "ipo"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_adapter_that_is_trained_further_is_its_own_reference(make, dropout):
    model, other = tiny_lora(dropout), tiny_lora()
    perturb(model)
    other.load_state_dict(model.state_dict())
    objective = start(model, as_base=False, objective=make())
    rows = rows_of(objective)
    how = Collating(64, False, 0)
    assert "kept" in objective.reference.told(model)
    assert "within 0.0e+00 of 0" in prove_start(model, objective, rows, how, None)
    batch = whole_batch(objective, rows)
    before = objective.log_probs(other, batch).detach()
    perturb(model, seed=9)
    model.train()
    torch.testing.assert_close(objective.of_reference(model, batch), before)
    assert model.training and not torch.allclose(objective.log_probs(model, batch), before, atol=0.1)
    with pytest.raises(TrainingStopped, match="must be within 1e-06: the reference is not the policy"):
        prove_start(model, objective, rows, how, None)
    with objective.at_start(model):
        torch.testing.assert_close(objective.log_probs(model, batch), before)


def test_a_new_adapter_has_the_base_as_its_reference():
    model = tiny_lora()
    objective = start(model)
    assert objective.reference.start is None and "switched off" in objective.reference.told(model)
    assert "within 0.0e+00 of 0" in prove_start(model, objective, PAIRS, Collating(64, False, 0), None)
    perturb(model)
    batch = whole_batch(objective)
    torch.testing.assert_close(objective.of_reference(model, batch), objective.log_probs(tiny_llama(), batch))
    starts_elsewhere = tiny_lora()
    perturb(starts_elsewhere)
    assert start(starts_elsewhere).reference.start is not None


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", ["pairs", "labelled"])
def test_what_is_computed_beforehand_is_what_the_step_would(tmp_path, monkeypatch, kind, packing):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    model, how, lines = tiny_lora(), Collating(64, packing, 0), []
    objective = start(model, objective=Kto() if kind == "labelled" else None)
    rows = rows_of(objective)
    known = precompute(model, objective, rows, how, None, lines.append)
    again = precompute(model, objective, rows, how, None, lines.append)
    assert [line.partition("reference: ")[2] for line in lines] == [
        f"log-probabilities of {len(rows):,} rows computed and kept",
        f"log-probabilities of {len(rows):,} rows from the cache",
    ]
    perturb(model)
    part = np.array([6, 1, 3])
    for one in (known, again):
        for chosen, update in ((one, list(range(len(rows)))), (one.select(part), [2, 0])):
            plain = replace(chosen, **dict.fromkeys(UNKNOWN & vars(chosen).keys()))
            two = [objective.collate(of, update, Collating(4096, packing, 0)) for of in (chosen, plain)]
            assert all(batch.reference is not None for batch in two[0])
            assert all(batch.reference is None for batch in two[1])
            for batch, other in zip(*(objective.prepare(model, batches) for batches in two), strict=True):
                torch.testing.assert_close(batch.reference, other.reference, atol=1e-5, rtol=1e-6)
                values = [objective.loss(model, x).values for x in (batch, other)]
                torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    assert len(list((tmp_path / "reference").iterdir())) == 1


UNKNOWN = {"reference", "mismatched_reference"}


def test_another_reference_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path))
    how, model = Collating(64, False, 0), tiny_lora()
    changed = copy.deepcopy(PAIRS.rows)
    changed.digest[3] += 1
    perturb(model)
    for number, (objective, rows) in enumerate(
        (
            (start(tiny_lora()), PAIRS),
            (start(model), PAIRS),
            (start(tiny_lora()), PAIRS.__class__(changed, PAIRS.margins)),
            (start(tiny_lora(), objective=Preference(PreferenceLoss({"sigmoid": 1.0}), ld_alpha=0.5)), PAIRS),
        )
    ):
        precompute(model if number == 1 else tiny_lora(), objective, rows, how, None, lambda line: None)
        assert len(list((tmp_path / "reference").iterdir())) == number + 1


@pytest.mark.skipif(kernels.instruction_set() == "reference", reason="only the kernel's attention lets rows share")
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "ops"])
@pytest.mark.parametrize("name", ["sft", "sigmoid", "orpo", "kto"])
def test_beginnings_that_are_computed_once_change_nothing(monkeypatch, blocks, name):
    if not blocks:  # then attention alone is the kernel's
        monkeypatch.setattr(fuse, "_take_over_blocks", lambda calls: 0)
    alike = make_pairs([(9, 9), (12, 5), (7, 9)], [8, 4, 5])
    alike.rows.ids[9:18] = [*alike.rows.ids[:8], 5]  # a single token each
    for start_of in alike.rows.offsets[2:-1]:
        alike.rows.ids[start_of : start_of + 3] = alike.rows.ids[:3]  # all begin alike, as with a system prompt
    for pairs in (PAIRS, alike):
        rows = {"sft": pairs.rows, "kto": make_labelled(pairs)}.get(name, pairs)
        found, sizes = [], []
        for sharing in (False, True):
            model = tiny_lora()
            perturb(model, scale=0.3)
            with fuse.fused(model, lambda line: None):
                assert shares_beginnings(model)
                objective = Objective() if name == "sft" else start(model, False, objectives()[name]())
                perturb(model, seed=9)
                batches = objective.collate(rows, range(len(rows)), Collating(64, True, 0, sharing))
                with torch.no_grad():
                    batches = objective.prepare(model, batches)
                for batch in batches:
                    values = objective.loss(model, batch).values
                    (values.sum() / len(rows)).backward()
            found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
            sizes.append(sum(batch.input_ids.numel() for batch in batches))
            assert not shares_beginnings(model)  # without the kernel such a batch is computed whole
            torch.testing.assert_close(objective.loss(model, batch).values, values, atol=1e-5, rtol=1e-4)
        assert sizes[1] < 0.95 * sizes[0]
        for key, grad in found[0].items():
            torch.testing.assert_close(found[1][key], grad, atol=1e-5, rtol=1e-4, msg=key)


def test_ktos_kl_is_over_the_whole_update():
    objective, model = Kto(), moved()
    cuts = [
        objective.collate(LABELLED, range(12), Collating(budget, packing, 0))
        for budget, packing in ((4096, True), (20, True), (40, False))
    ]
    kls = [objective.prepare(model, batches)[0].kl.item() for batches in cuts]
    assert min(map(len, cuts)) < max(map(len, cuts))
    assert kls[0] > 0.1 and kls == pytest.approx([kls[0]] * 3, rel=1e-6)


def test_the_log_tells_rewards_and_log_probabilities(tmp_path):
    loop = make_loop(tiny_lora(), PAIRS, tmp_path, objective=start(tiny_lora()), held_out=PAIRS, max_steps=12)
    loop.fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["eval_loss"] < 0.6 and last["eval_rewards/accuracies"] == 1
    assert last["eval_rewards/margins"] == pytest.approx(
        last["eval_rewards/chosen"] - last["eval_rewards/rejected"], abs=1e-6
    )
    assert last["eval_tokens/chosen"] == np.mean(PAIRS.rows.supervised_counts[::2])
