"""Preference objectives from a recipe to the proof."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from smidgen.data.packing import micro_batches
from smidgen.errors import DataError, TrainingStopped, UsageError
from smidgen.evaluation.report import write_report
from smidgen.models.scores import token_losses
from smidgen.recipe import WatchRecipe, load_recipe
from smidgen.training import checkpoint, run
from smidgen.training import proof as proof_module
from smidgen.training.watch import Watch, check_refusals, is_refusal
from tests.training.conftest import make_rows, tiny_lora, write_recipe

COLOURS = (("sky", "blue", "red"), ("sea", "green", "two"), ("sun", "red", "sky sea"), ("one", "two three", "blue"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])


def write_preferences(folder: Path, objective: str, rows: list | None = None, **sections) -> Path:
    """A recipe over pairs, or over labelled answers, of which the model can learn the better ones."""
    path = write_recipe(folder)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    made = []
    for thing, good, bad in COLOURS:
        prompt = f"what is the colour of the {thing}"
        if objective == "kto":
            made += [{"prompt": prompt, "completion": a, "label": a == good} for a in (good, bad)]
        else:
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
    data = folder / "preferences.jsonl"
    told = made * 6 if rows is None else rows
    data.write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")
    recipe["objective"] = objective
    recipe["data"] = {"train": str(data), "max_length": 32}
    for name, fields in sections.items():
        recipe.setdefault(name, {}).update(fields)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def carry_out(path: Path, *overrides: str, **options):
    lines: list[str] = []
    return run.train(load_recipe(path, overrides)[0], say=lines.append, **options), lines


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_a_recipe_learns_from_preferences(tmp_path, objective):
    path = write_preferences(tmp_path, objective)
    proof, lines = carry_out(path, "train.epochs=6")
    assert proof.passed, proof.lines()
    lines = "\n".join(lines)
    assert ("log-ratio at the start within 0.0e+00 of 0" in lines) == (objective in ("dpo", "ipo", "kto"))
    assert "length: the better answer is the longer one" in lines
    told = log(tmp_path / "run")
    assert told[-1]["rewards/chosen"] > told[-1]["rewards/rejected"]
    assert told[-1]["loss"] < told[0]["loss"]
    metrics = proof.checks[0].numbers["metrics"]
    if objective != "kto":
        assert metrics["on"]["rewards/accuracies"] == 1


def test_an_adapter_of_an_earlier_run_is_the_reference(tmp_path):
    path = write_preferences(tmp_path, "dpo")
    carry_out(path, f"output={tmp_path / 'first'}")
    proof, lines = carry_out(path, init_adapter=tmp_path / "first" / "adapter")
    assert proof.passed, proof.lines()
    assert any("the adapter as it starts, kept; log-ratio at the start within 0.0e+00 of 0" in line for line in lines)
    assert log(tmp_path / "run")[0]["rewards/margins"] < log(tmp_path / "first")[-1]["rewards/margins"]
    off = proof.checks[0].numbers["metrics"]["off"]
    assert off["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_full_tuning_needs_no_second_model(tmp_path, objective):
    path = write_preferences(tmp_path, objective, adapter={"method": "full"})
    proof, lines = carry_out(path, "adapter={method: full}", "train.learning_rate=0.002", "train.epochs=8")
    assert proof.passed, proof.lines()
    assert any("the model before the training; log-ratio at the start within" in line for line in lines)
    assert proof.checks[0].numbers["off"] == pytest.approx(0.5 if objective == "kto" else 0.693147, abs=1e-5)


def test_a_run_with_the_reference_beforehand_is_the_same_run(tmp_path):
    path = write_preferences(tmp_path, "dpo")
    one, _ = carry_out(path, f"output={tmp_path / 'a'}")
    two, lines = carry_out(path, "preference.precompute_ref_log_probs=true", f"output={tmp_path / 'b'}")
    assert any("log-probabilities of 24 rows computed and kept" in line for line in lines)
    for first, second in zip(log(tmp_path / "a"), log(tmp_path / "b"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-4)
    assert one.passed and two.passed


def test_another_model_may_be_the_reference(tmp_path):
    path = write_preferences(tmp_path, "dpo")
    proof, lines = carry_out(path, f"preference.ref_model={tmp_path / 'base'}")
    assert proof.passed and f"reference: {tmp_path / 'base'}" in lines


@pytest.mark.slow
def test_a_resumed_run_has_the_same_reference(tmp_path):
    path = write_preferences(tmp_path, "kto", train={"save_steps": 3})
    carry_out(path, f"output={tmp_path / 'first'}")
    options = {"init_adapter": tmp_path / "first" / "adapter"}
    carry_out(path, **options)
    straight = log(tmp_path / "run")
    for kept in (tmp_path / "run" / "checkpoints").iterdir():
        if kept.name != "step-6":
            shutil.rmtree(kept)
    carry_out(path, resume=True)
    keys = ("step", "loss", "grad_norm", "rewards/chosen", "kl")
    assert [[line[key] for key in keys] for line in log(tmp_path / "run")] == [
        [line[key] for key in keys] for line in straight
    ]


# ---- the watch ----


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_clean_run_raises_no_alarm(tmp_path, seed):
    proof, lines = carry_out(write_preferences(tmp_path, "dpo"), f"seed={seed}", "watch.samples_steps=4")
    assert proof.passed, proof.lines()
    assert not any("stopped" in line for line in lines)
    told = log(tmp_path / "run")
    assert told[0]["watch/kl"] < told[-1]["watch/kl"] < 5
    assert told[0]["watch/entropy"] > 0.5
    samples = (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in samples] == [4] * 4 + [8] * 4 + [12] * 4
    assert "samples/tokens_start" in told[-1]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Reward margins" in page and "KL from the start" in page


@pytest.mark.slow
def test_a_collapse_stops_the_run_and_leaves_a_good_checkpoint(tmp_path, stories260k):
    path = write_preferences(tmp_path, "dpo", train={"max_steps": 24, "warmup_ratio": 1.0, "logging_steps": 1})
    options = (f"model={stories260k}", "data.max_length=128", "watch.refusals=false", "train.save_steps=1")
    clean, _ = carry_out(path, *options, "train.learning_rate=0.002", f"output={tmp_path / 'clean'}")
    assert clean.passed and log(tmp_path / "clean")[-1]["step"] == 24
    with pytest.raises(TrainingStopped, match=r"stopped at step \d+: the policy is .*train.learning_rate") as error:
        carry_out(path, *options, "train.learning_rate=0.2")
    told = log(tmp_path / "run")
    assert told[-2]["watch/kl"] < 5 < told[-1]["watch/kl"] and told[-1]["step"] < 24
    found = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert found and found.step == told[-1]["step"] - 1 and str(found.folder) in str(error.value)


def test_what_is_wrong_is_said(tmp_path):
    model, rows = tiny_lora(), make_rows([9, 12, 7], prompt=3)
    watch = Watch(WatchRecipe(patience=2), model, None, rows, tmp_path)
    seen = watch.look()
    assert seen["watch/kl"] == pytest.approx(0, abs=1e-6) and not watch.alarms(seen)
    assert -seen["watch/chosen"] == pytest.approx(token_mean(model, rows), rel=1e-5)
    away = seen | {"watch/kl": 6.0}
    assert ["6.00 nats a token from its start (watch.max_kl: 5)" in text for text in watch.alarms(away)] == [True]
    assert "entropy fell from" in watch.alarms(seen | {"watch/entropy": 0.01})[0]
    falls = [watch.alarms(seen | {"watch/chosen": seen["watch/chosen"] - by}) for by in (4, 5, 4.5, 5, 6)]
    assert [bool(found) for found in falls] == [False, True, False, False, True]
    assert "6.00 nats a token less likely than at the start, and fell 2 looks" in falls[-1][0]
    off = WatchRecipe(max_kl=None, min_entropy=None, max_fall=None)
    quiet = Watch(off, model, None, rows, tmp_path)
    assert not quiet.alarms({"watch/kl": float("nan"), "watch/entropy": 0.0, "watch/chosen": -99.0})
    assert watch.alarms({"watch/kl": float("nan"), "watch/entropy": 1.0, "watch/chosen": -1.0})


def token_mean(model, rows) -> float:
    """The loss of each supervised token, one row at a time, of the first and the last of the rows too."""
    batches = micro_batches(rows, range(len(rows)), token_budget=99, packing=False, pad_id=0)
    losses = torch.cat([token_losses(model, batch)[0] for batch in batches])
    return losses.mean().item()


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        ("I\u2019m sorry, but I cannot help.", True),
        ("As an AI, I have none.", True),
        ("Use kill -9 and the number.", False),
    ],
)
def test_refusals_are_found_by_their_phrases(answer, refused):
    assert is_refusal(answer) == refused


def test_more_refusals_fail_the_proof():
    assert check_refusals(0.0, 0.1).passed and not check_refusals(0.0, 0.5).passed


# ---- rows that cannot be learned from ----

GOOD = {"prompt": "what is the colour of the sky", "chosen": "blue", "rejected": "red"}


def test_pairs_that_the_cut_makes_equal_are_counted(tmp_path):
    same = {"prompt": "what is", "chosen": "red " * 40 + "blue", "rejected": "red " * 40 + "two"}
    path = write_preferences(tmp_path, "dpo", [GOOD] * 470 + [same] * 30)
    _, lines = carry_out(path, "data.on_long=truncate", "train.max_steps=1")
    told = "30 rows left out: chosen and rejected are the same after the cut to max_length=32"
    assert any(told in line for line in lines)


def test_rows_that_say_nothing_are_told(tmp_path):
    empty = GOOD | {"rejected": "  "}
    long = {"prompt": "what is the colour of the " * 30, "chosen": "blue", "rejected": "red"}
    path = write_preferences(tmp_path, "dpo", [GOOD, empty, long, GOOD | {"chosen": "two"}])
    _, lines = carry_out(path, "train.max_steps=1")
    text = "\n".join(lines)
    assert "1 rows left out: empty rejected (lines 2)" in text
    assert "rows exceed 32 tokens: 1 lose the beginning of their prompt" in text, text
    _, lines = carry_out(path, "train.max_steps=1", "data.on_long=drop", overwrite=True)
    assert "1 dropped" in "\n".join(lines)
    lacking = write_preferences(tmp_path, "dpo", [GOOD, {"prompt": "what", "chosen": "two"}])
    with pytest.raises(DataError, match=r"preferences.jsonl:2: field 'rejected' is missing"):
        carry_out(lacking, overwrite=True)
    with pytest.raises(UsageError, match="a single prompt"):
        carry_out(
            write_preferences(tmp_path, "kto", [{"prompt": "what", "completion": "two", "label": True}] * 3),
            overwrite=True,
        )
