"""Controls of forgetting: their gradients, what they draw, and runs that are measured before and after."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from smidgen.errors import DataError, UsageError
from smidgen.evaluation.report import write_report
from smidgen.losses.preference import PreferenceLoss
from smidgen.recipe import GeneralRecipe
from smidgen.training import proof as proof_module
from smidgen.training.forgetting import KL_SHARE, SLIGHT, Controls, check_kept, fisher_diagonal, paired_bootstrap
from smidgen.training.objectives import Collating, Objective
from smidgen.training.preference import Kto, Preference
from tests.conftest import perturb, tiny_llama
from tests.training.conftest import make_labelled, make_loop, make_pairs, make_rows, tiny_lora, write_recipe
from tests.training.test_loop import loop_running
from tests.training.test_preference_runs import carry_out, log, write_preferences

GENERAL = make_rows([12, 5, 9, 16, 7, 11, 3, 14], prompt=0, seed=5)
PAIRS = make_pairs([(7, 12), (9, 6), (16, 10), (5, 8), (11, 11), (6, 14)], [3, 4, 5, 2, 6, 3])
OBJECTIVES = {
    "sft": lambda: (Objective(), make_rows([9, 12, 7, 16, 5, 10], prompt=3)),
    "dpo": lambda: (Preference(PreferenceLoss({"sigmoid": 1.0})), PAIRS),
    "kto": lambda: (Kto(), make_labelled(PAIRS)),
}
ALL = {"share": 0.4, "ewc": 20.0, "l2": 0.3, "kl": 0.7}
WHOLE = Collating(4096, False, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])


def gradients(folder: Path, budget: int, packing: bool, name: str, **fields: float):
    """The gradients of one update of a LoRA that moved since the controls saw it, and these controls."""
    model = tiny_lora().double()
    perturb(model, scale=0.2)
    objective, rows = OBJECTIVES[name]()
    loop = make_loop(model, rows, folder, budget=budget, packing=packing, objective=objective, max_grad_norm=1e9)
    loop.controls = Controls(GeneralRecipe(**fields), model, GENERAL, loop.how, seed=1)
    perturb(model, seed=9, scale=0.2)
    found: dict[str, torch.Tensor] = {}
    named = loop.parameters.items()
    loop.optimizer.register_step_pre_hook(lambda *_: found.update({name: p.grad.clone() for name, p in named}))
    with loop_running(loop):
        loop._update(list(range(6)))
    return found, loop


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_do_not_depend_on_the_cut_into_micro_batches(tmp_path, name):
    whole, _ = gradients(tmp_path, 4096, False, name, **ALL)
    alone, _ = gradients(tmp_path, 4096, False, name)
    assert any((grad - alone[key]).abs().max() > 1e-2 for key, grad in whole.items())
    for budget, packing in ((32, False), (48, True), (4096, True)):
        cut, _ = gradients(tmp_path, budget, packing, name, **ALL)
        for key, grad in whole.items():
            torch.testing.assert_close(cut[key], grad, atol=1e-6, rtol=1e-6, msg=f"{name} {budget} {key}")


@pytest.mark.parametrize("control", ALL)
def test_each_control_adds_the_gradient_of_its_formula(tmp_path, control):
    """Against plain calls of the model, row by row."""
    found, _ = gradients(tmp_path, 32, False, "sft", **{control: ALL[control]})
    alone, loop = gradients(tmp_path, 32, False, "sft")
    model, base = tiny_lora().double(), tiny_llama().double()
    perturb(model, scale=0.2)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if control == "ewc":
        fisher = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        for row in GENERAL:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            model.zero_grad()
            model(ids[None]).logits[0, :-1].log_softmax(1).gather(1, ids[1:, None]).sum().backward()
            fisher |= {name: fisher[name] + p.grad**2 for name, p in model.named_parameters() if name in fisher}
        fisher = {name: tensor / (sum(GENERAL.lengths) - len(GENERAL)) for name, tensor in fisher.items()}
    perturb(model, seed=9, scale=0.2)
    model.zero_grad()
    if control in ("share", "kl"):
        rows = Controls(GeneralRecipe(**{control: ALL[control]}), model, GENERAL, WHOLE, seed=1).draw(0, 59)
        assert rows is not None and loop.lengths.sum() == 59
        losses = []
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            now = model(ids[None]).logits[0, :-1].log_softmax(1)
            if control == "share":
                losses.append(-0.4 / 0.6 * now.gather(1, ids[1:, None])[:, 0])
            else:
                reference = base(ids[None]).logits[0, :-1].log_softmax(1).detach()
                losses.append(0.7 * (reference.exp() * (reference - now)).sum(1))
        torch.cat(losses).mean().backward()
    for name, parameter in model.named_parameters():
        if name not in start:
            continue
        if control == "ewc":
            parameter.grad = 20 * fisher[name] * (parameter.detach() - start[name])
        if control == "l2":
            parameter.grad = 0.3 * (parameter.detach() - start[name])
        torch.testing.assert_close(found[name] - alone[name], parameter.grad, atol=1e-6, rtol=1e-6)
        assert "lora_A" in name or parameter.grad.abs().max() > 1e-5


class Bigram(nn.Module):
    """A table of logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(48, 48, generator=random, dtype=torch.float64))

    def forward(self, input_ids, use_cache, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids])


def test_the_fisher_information_of_a_bigram_model_is_its_formula():
    model = Bigram()
    expected = torch.zeros(48, 48, dtype=torch.float64)
    for row in GENERAL:
        gradient = torch.zeros(48, 48, dtype=torch.float64)
        for before, after in zip(row.input_ids[:-1].tolist(), row.input_ids[1:].tolist(), strict=True):
            gradient[before] -= model.table[before].detach().softmax(0)
            gradient[before, after] += 1
        expected += gradient**2
    expected /= sum(len(row.input_ids) - 1 for row in GENERAL)
    (found,) = fisher_diagonal(model, [model.table], GENERAL, WHOLE, None)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert model.table.grad is None


# ---- replay ----


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_replay_is_the_share_of_the_tokens_of_every_update(share):
    controls = Controls(GeneralRecipe(share=share), None, GENERAL, WHOLE, seed=1)
    known = [row.input_ids.tolist() for row in GENERAL]
    seen = set()
    for step, tokens in enumerate([40, 77, 153, 64, 200, 91, 58]):
        rows = controls.draw(step, tokens)
        assert rows is not None
        general = int(rows.lengths.sum())
        wanted = max(2, share / (1 - share) * tokens)
        assert wanted - 1.5 <= general <= wanted + 0.5
        drawn = [row.input_ids.tolist() for row in rows]
        assert all(ids in known for ids in drawn[:-1]) and len(drawn[-1]) >= 2
        assert any(ids[: len(drawn[-1])] == drawn[-1] for ids in known)
        again = controls.draw(step, tokens)
        assert again is not None and drawn == [row.input_ids.tolist() for row in again]
        seen.add(str(drawn))
    assert len(seen) > 4


def test_a_kl_without_replay_has_its_own_share():
    rows = Controls(GeneralRecipe(kl=1.0), None, GENERAL, WHOLE, seed=1).draw(0, 900)
    assert rows is not None
    assert rows.lengths.sum() == pytest.approx(900 * KL_SHARE / (1 - KL_SHARE), abs=1.5)
    assert Controls(GeneralRecipe(ewc=0.0), None, GENERAL, WHOLE, seed=1).draw(0, 900) is None


# ---- what is measured ----


def test_the_interval_is_that_of_the_mean_change():
    random = np.random.default_rng(3)
    counts = random.integers(5, 50, 400)
    change = counts * 0.2 + random.normal(0, 1, 400) * np.sqrt(counts)
    low, high = paired_bootstrap(change, counts)
    half = 1.96 * (change - counts * change.sum() / counts.sum()).std() * 20 / counts.sum()
    mean = change.sum() / counts.sum()
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)


@pytest.mark.parametrize(
    ("change", "spread", "verdict"),
    [(0.2, 0.1, "forgot"), (SLIGHT / 4, SLIGHT / 10, "kept"), (-0.3, 0.1, "kept"), (0.1, 5.0, "unclear, more general")],
)
def test_the_verdict_follows_from_the_interval(change, spread, verdict):
    rows = make_rows([11] * 40)
    before = np.full(40, 30.0)
    after = before + 10 * (change + spread * np.tile([-1.0, 1.0], 20))
    found = check_kept(rows, before, after)
    assert verdict in found.text and found.passed == (verdict != "forgot")
    assert found.numbers["difference"] == pytest.approx(change)
    assert f"-> {3 + change:.4f}" in found.text and "on 40 held-out rows 3.0000" in found.text


# ---- runs ----


def with_general(path: Path, **fields) -> Path:
    """The recipe with texts and answers that are to be kept."""
    folder = path.parent
    things, colours = ("sky", "sea", "sun"), ("red", "green", "blue", "one")
    texts = [{"text": f"the {thing} is {colour} of the sea"} for thing in things for colour in colours]
    answers = [{"prompt": f"what is {a}", "completion": b} for a, b in (("one", "two"), ("two", "three sky"))] * 4
    for name, rows in (("texts", texts), ("answers", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["general"] = {"data": [str(folder / "texts.jsonl"), str(folder / "answers.jsonl")], "eval_size": 6} | fields
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write(folder: Path, objective: str, **fields) -> Path:
    if objective in ("dpo", "kto", "orpo"):
        return with_general(write_preferences(folder, objective), **fields)
    path = write_recipe(folder)
    if objective == "pretrain":
        texts = folder / "learned.jsonl"
        texts.write_text('{"text": "what is the colour of the sky"}\n' * 16, encoding="utf-8")
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe |= {"objective": "pretrain", "data": {"train": str(texts), "max_length": 32}}
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return with_general(path, **fields)


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "kto", "orpo")]


@pytest.mark.parametrize("objective", ["sft", "pretrain", *SLOWER])
def test_every_objective_is_held_and_measured(tmp_path, objective):
    path = write(tmp_path, objective, share=0.3, ewc=1.0, l2=0.01, kl=0.5)
    proof, lines = carry_out(path, "train.max_steps=4", "train.logging_steps=1")
    assert "what is to be kept:" in lines and any("data: train 14 rows" in line for line in lines)
    assert (
        "against forgetting: replay 30.0% of the tokens, KL 0.5 on 30.0% of the tokens, EWC 1 by the Fisher "
        "information of 14 general rows, L2 0.01"
    ) in lines
    (check,) = [check for check in proof.checks if check.name == "general"]
    assert any(check.text in line for line in lines) and "on 6 held-out rows" in check.text
    assert check.numbers["difference"] == pytest.approx(check.numbers["after"] - check.numbers["before"])
    assert check.numbers["low"] < check.numbers["difference"] < check.numbers["high"]
    told = log(tmp_path / "run")
    assert told[-1] == {"step": 4} | {f"general/{name}": value for name, value in check.numbers.items()}
    assert abs(told[0]["general/kl"]) < 1e-6 < told[3]["general/kl"]
    assert told[0]["general/loss"] == pytest.approx(check.numbers["before"], rel=0.5)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert check.text.split(" (95")[0] in page.replace("&gt;", ">") and "Loss on general text" in page


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, method):
    path = write(tmp_path, "sft", share=0.3, ewc=1.0, l2=0.01, **({"kl": 0.5} if method == "lora" else {}))
    lora = "r: 4, target_modules: all-linear, lora_dropout: 0.1"
    adapter = f"adapter={{method: {method}, {lora if method == 'lora' else ''}}}"
    options = (adapter, "train.max_steps=6", "train.save_steps=3", "train.logging_steps=1")
    carry_out(path, *options)
    kept = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    straight, trained = log(tmp_path / "run"), load_file(tmp_path / "run" / kept)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    carry_out(path, *options, resume=True)
    for first, second in zip(straight, log(tmp_path / "run"), strict=True):
        assert first | {"tokens_per_second": 0} == second | {"tokens_per_second": 0}
    again = load_file(tmp_path / "run" / kept)
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.items())

    (tmp_path / "texts.jsonl").write_text('{"text": "the sky is red"}\n' * 12, encoding="utf-8")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-6")
    with pytest.raises(UsageError, match="the training data changed"):
        carry_out(path, *options, resume=True)


def test_an_adapter_that_is_trained_further_is_held_to_where_it_was(tmp_path):
    path = write(tmp_path, "sft", l2=1e6)
    first, _ = carry_out(path, "general={}", f"output={tmp_path / 'first'}")
    proof, lines = carry_out(path, init_adapter=tmp_path / "first" / "adapter")
    (check,) = [check for check in proof.checks if check.name == "general"]
    assert check.numbers["difference"] == pytest.approx(0, abs=0.05) and "against forgetting: L2 1e+06" in lines
    assert not any(check.name == "general" for check in first.checks)


def test_what_is_wrong_with_general_data_is_said_before_the_training(tmp_path):
    path = write(tmp_path, "sft")
    (tmp_path / "texts.jsonl").write_text('{"texts": "red"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"general.data: .*texts.jsonl:1"):
        carry_out(path)
    with pytest.raises(DataError, match=r"general.data: .*leaves none of 8 rows"):
        carry_out(path, f"general.data={tmp_path / 'answers.jsonl'}", "general.eval_size=8")


# ---- a model that tells stories ----

CONTROLS = {"share": 0.3, "ewc": 100.0, "l2": 0.1, "kl": 1.0}


@pytest.mark.slow
def test_each_control_lessens_what_a_model_of_stories_forgets(tmp_path, test_data, stories260k):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    torch.manual_seed(0)
    told = AutoModelForCausalLM.from_pretrained(stories260k).generate(
        torch.ones(160, 1, dtype=torch.int64), do_sample=True, max_new_tokens=64, pad_token_id=0
    )
    stories = [{"text": text} for text in tokenizer.batch_decode(told, skip_special_tokens=True)]
    speeches = (test_data / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8").split("\n\n")[:320]
    for name, rows in (("stories", stories), ("speeches", [{"text": speech} for speech in speeches])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(stories260k),
        "adapter": {"method": "lora", "r": 8, "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "speeches.jsonl"), "eval_size": 32, "max_length": 96},
        "objective": "pretrain",
        "train": {"learning_rate": 0.01, "batch_size": 16, "epochs": 2, "dtype": "float32"},
        "output": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    forgot, learned = {}, {}
    for control, value in {"none": 0, **CONTROLS}.items():
        general = {"data": str(tmp_path / "stories.jsonl"), "eval_size": 0.25}
        general |= {control: value} if value else {}
        path.write_text(yaml.safe_dump(recipe | {"general": general}), encoding="utf-8")
        proof, _ = carry_out(path, overwrite=True)
        checks = {check.name: check for check in proof.checks}
        forgot[control], learned[control] = checks["general"].numbers, checks["loss"].numbers
    assert forgot["none"]["low"] > 0.1
    for control in CONTROLS:
        assert forgot[control]["difference"] < 0.7 * forgot["none"]["difference"], control
        assert learned[control]["on"] < learned[control]["off"], control
