"""A recipe from the command line to the proof, in a folder of its own."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smidgen.errors import TrainingStopped, UsageError
from smidgen.recipe import load_recipe
from smidgen.training import proof as proof_module
from smidgen.training import run
from smidgen.training.guards import Interrupted
from smidgen.training.loop import Loop
from tests.training.conftest import write_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Leaves out the checks in a fresh process, which take seconds."""
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])


def carry_out(path: Path, *overrides: str, **options):
    lines: list[str] = []
    recipe, _ = load_recipe(path, overrides)
    return run.train(recipe, say=lines.append, **options), lines


def interrupt_at(monkeypatch, step: int) -> None:
    """Press Ctrl-C during that update."""
    update = Loop._update

    def pressing(self, rows):
        if self.step + 1 == step:
            signal.raise_signal(signal.SIGINT)
        update(self, rows)

    monkeypatch.setattr(Loop, "_update", pressing)


def numbers(folder: Path) -> list:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[line[key] for key in ("step", "loss", "lr", "grad_norm")] for line in lines]


def test_a_run_leaves_everything_that_is_needed_and_a_proof(tmp_path):
    proof, lines = carry_out(write_recipe(tmp_path, save_steps=6))
    folder = tmp_path / "run"
    assert proof.passed, proof.lines()
    memory = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    forecast = memory["forecast"]
    assert forecast["peak"] == sum(size for name, size in forecast.items() if name != "peak")
    assert forecast["peak"] == pytest.approx(memory["measured"]["peak"], rel=0.1)
    names = [check.name for check in proof.checks]
    assert names[:3] == ["loss", "moved", "frozen"]
    assert names[3:] == ["base", "keys", "acts", "off", "reload", "template", "stop", "merge"]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "log.jsonl",
        "proof.json",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/generation_config.json",
        "checkpoints/step-6/weights.safetensors",
        "checkpoints/step-12/state.json",
    }
    assert not {Path(name).suffix for name in names} & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
    told = "\n".join(lines)
    assert "targets: q_proj 2, k_proj 2" in told and "adapter moved: 28/28 tensors" in told
    assert "equal to the bit" in told
    stops = json.loads((folder / "adapter" / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert stops == [2]
    written = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    assert written["passed"] and len(written["samples"]) == 4
    assert load_recipe(folder / "recipe.yaml")[0].train.save_steps == 6


@pytest.mark.usefixtures("no_fresh_process")
def test_the_tuned_model_answers_what_it_was_taught(tmp_path):
    proof, _ = carry_out(write_recipe(tmp_path, epochs=12))
    right = [sample.after.split()[: len(sample.reference.split()) - 1] for sample in proof.samples]
    assert right == [sample.reference.split()[:-1] for sample in proof.samples]
    assert [sample.before for sample in proof.samples] != [sample.after for sample in proof.samples]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter={method: full}", "train.learning_rate=0.005"],
        ["adapter={method: freeze, num_layers: 1, modules: [norm]}", "train.learning_rate=0.01"],
        ["adapter={method: full}", "train.learning_rate=0.005", "train.dtype=bfloat16"],
    ],
    ids=["full", "freeze", "full in bfloat16"],
)
def test_base_parameters_can_be_trained(tmp_path, overrides):
    proof, _ = carry_out(write_recipe(tmp_path), *overrides)
    assert proof.passed, proof.lines()
    start, end = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "run/model"))
    assert start.keys() == end.keys()
    unmoved = {name for name in start if torch.equal(start[name].to(end[name].dtype), end[name])}
    frozen = {name for name in start if ".layers.0." in name or "embed_tokens" in name}
    assert unmoved == (frozen if "freeze" in overrides[0] else set())


@pytest.mark.parametrize(
    "overrides", [[], ["data.packing=true"], ["adapter={method: full}"]], ids=["padded", "packed", "full"]
)
@pytest.mark.usefixtures("no_fresh_process")
def test_stopping_and_resuming_gives_the_same_run_to_the_bit(tmp_path, monkeypatch, overrides):
    path = write_recipe(tmp_path, max_steps=12, learning_rate=0.003)
    if "full" not in str(overrides):
        overrides = [*overrides, "adapter.lora_dropout=0.05"]
    carry_out(path, *overrides, f"output={tmp_path / 'straight'}")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step=5)
        with pytest.raises(Interrupted, match="step 5 of 12"):
            carry_out(path, *overrides)
    carry_out(path, *overrides, resume=True)
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "run")
    first, second = (
        load_file(next(path for path in (tmp_path / name).glob("*/*model.safetensors"))) for name in ("straight", "run")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("no_fresh_process")
def test_a_changed_recipe_is_not_resumed(tmp_path):
    path = write_recipe(tmp_path, save_steps=2, max_steps=2)
    carry_out(path)
    with pytest.raises(UsageError, match=r"cannot resume from step 2.*\n  adapter.r: 4 -> 8\n.*--init-adapter"):
        carry_out(path, "adapter.r=8", resume=True)
    carry_out(path, "train.save_steps=1", resume=True)


@pytest.mark.usefixtures("no_fresh_process")
def test_changed_data_are_not_resumed(tmp_path):
    path = write_recipe(tmp_path, save_steps=2, max_steps=2)
    carry_out(path)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write('{"prompt": "the sun", "completion": "is red"}\n')
    with pytest.raises(UsageError, match="the training data changed"):
        carry_out(path, resume=True)


@pytest.mark.usefixtures("no_fresh_process")
def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    path = write_recipe(tmp_path, max_steps=2)
    carry_out(path)
    with pytest.raises(UsageError, match=r"is not empty.*--resume.*--overwrite"):
        carry_out(path)
    carry_out(path, overwrite=True)
    (tmp_path / "run" / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds more than a run \(thesis.txt\)"):
        carry_out(path, overwrite=True)
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(UsageError, match="no checkpoint to resume from"):
        carry_out(write_recipe(tmp_path), resume=True)


def _on_the_gpu(self, rows):
    raise torch.OutOfMemoryError("CUDA out of memory")


def _on_the_cpu(self, rows):
    torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error, whatever the platform calls it


@pytest.mark.parametrize("update", [_on_the_gpu, _on_the_cpu])
def test_running_out_of_memory_shows_the_forecast_and_the_smallest_change(tmp_path, monkeypatch, update):
    monkeypatch.setattr(Loop, "_update", update)
    with pytest.raises(TrainingStopped) as told:
        carry_out(write_recipe(tmp_path))
    lines = str(told.value).splitlines()
    assert lines[0] == "out of memory in step 1; this was the forecast."
    assert lines[1].startswith("memory: weights") and "fits: yes (needs" in lines[2]
    assert re.fullmatch(r"smallest change: train.micro_batch_tokens=\d+ \(peak .* [MG]B\)", lines[-1])


def test_other_errors_of_the_machine_are_not_called_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(Loop, "_update", lambda self, rows: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"inconsistent tensor size|size mismatch"):
        carry_out(write_recipe(tmp_path))


def test_a_real_model_learns_a_text(tmp_path, stories260k):
    """Continued pretraining of a model of 260K parameters."""
    text = tmp_path / "text.jsonl"
    names = ("Ada", "Bo", "Cy", "Di")
    lines = [{"text": f"{name} went up the hill. At the top {name} sat down to eat a pear."} for name in names * 5]
    text.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = write_recipe(tmp_path)
    overrides = [f"model={stories260k}", f"data.train=[{{path: {text}}}]", "objective=pretrain", "data.max_length=64"]
    proof, _ = carry_out(path, *overrides, "train.learning_rate=0.01")
    assert proof.passed, proof.lines()
    loss = proof.checks[0].numbers
    assert loss["on"] < 0.7 * loss["off"]


@pytest.mark.usefixtures("no_fresh_process")
def test_an_init_adapter_goes_on_where_it_was(tmp_path):
    path = write_recipe(tmp_path)
    first, _ = carry_out(path)
    end = first.checks[0].numbers["on"]
    options = [f"output={tmp_path / 'second'}", "train.learning_rate=1e-9", "train.max_steps=1"]
    second, lines = carry_out(path, *options, init_adapter=tmp_path / "run" / "adapter")
    assert second.checks[0].numbers["on"] == pytest.approx(end, abs=1e-4)
    assert any("taken from" in line for line in lines)


def test_an_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"report_to: .*tensorbord"):
        carry_out(write_recipe(tmp_path, report_to=["tensorbord"]))


@pytest.mark.usefixtures("no_fresh_process")
def test_tensorboard_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    carry_out(write_recipe(tmp_path, report_to=["tensorboard"], max_steps=2))
    assert list((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))


@pytest.mark.usefixtures("no_fresh_process")
def test_a_failed_proof_is_told(tmp_path):
    proof, lines = carry_out(write_recipe(tmp_path, learning_rate=1e-30, max_steps=2))
    assert not proof.passed
    assert any(line.startswith("FAIL adapter moved") for line in lines)
