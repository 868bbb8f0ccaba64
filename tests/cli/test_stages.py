"""A flow over a tiny model: in order, gated, resumed stage by stage, and told why something runs again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from smidgen.cli import stages
from smidgen.cli.main import main
from smidgen.errors import GateFailed, UsageError
from smidgen.flow import load_flow
from smidgen.models import save
from smidgen.models.lineage import read_lineage
from smidgen.training import proof as proof_module
from smidgen.training.loop import Loop
from tests.training.conftest import write_recipe

GATE = "eval.loss <= 10"


def write_flow(folder: Path, **changes: Any) -> Path:
    recipe = folder / "recipe.yaml"
    if not recipe.exists():
        write_recipe(folder, max_steps=4, save_steps=1, save_total_limit=2)
        pairs = [
            {"prompt": f"what is the colour of the {thing}", "chosen": colour, "rejected": "one two"}
            for thing, colour in (("sky", "blue"), ("sea", "green"), ("sun", "red"))
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 6), encoding="utf-8")
    found: dict[str, Any] = {
        "sft": {"train": str(recipe)},
        "dpo": {"train": str(recipe), "from": "sft", "set": preferring(folder)},
        "score": {"evaluate": "dpo", "data": str(folder / "rows.jsonl"), "limit": 4},
        "good": {"gate": "dpo", "require": [GATE, "verdict"]},
        "merged": {"merge": "dpo", "dtype": "float32"},
    }
    path = folder / "flow.yaml"
    text = yaml.safe_dump({"output": str(folder / "out"), "stages": found | changes}, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def preferring(folder: Path, rate: float = 0.01) -> dict[str, Any]:
    """What makes a preference run of the recipe."""
    data = {"data.train": str(folder / "pairs.jsonl"), "data.eval": str(folder / "pairs.jsonl"), "data.eval_size": None}
    return {"objective": "dpo", **data, "train.learning_rate": rate, "seed": 7}


def carry_out(path: Path) -> list[str]:
    lines: list[str] = []
    stages.run_flow(load_flow(path), lines.append)
    return [line for line in lines if line.startswith(("stage ", "gate ", "resumed "))]


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof_module, "verify_afresh", lambda folder: [])  # takes seconds
    return tmp_path


@pytest.mark.slow
def test_stages_run_in_order_and_again_only_where_something_changed(quick: Path, capsys):
    path = write_flow(quick)
    told = carry_out(path)
    loss = json.loads((quick / "out" / "dpo" / "proof.json").read_text())["checks"][0]["numbers"]["on"]
    assert told == [
        "stage sft: train",
        "stage dpo: train sft",
        "stage score: evaluate dpo",
        f"gate good: eval.loss of dpo must be <= 10, and is {loss:.6g}",
        "gate good: verdict of dpo must be true, and is true",
        "stage merged: merge dpo",
    ]
    root = read_lineage(quick / "out" / "merged")
    (dpo,) = root.parents
    (sft,) = dpo.parents
    assert (dpo.folder.name, sft.folder.name) == ("dpo", "sft")
    assert {'objective: "sft" -> "dpo"', "train.learning_rate: 0.02 -> 0.01", "seed: 42 -> 7"} <= {*dpo.changed}
    assert all(check.passed for check in root.all_checks())

    # Nothing changed; then what changes no result, a gate, and the recipe of the second run.
    done = [line.partition(":")[0] + ": done before" for line in told if line.startswith("stage")]
    assert [line for line in carry_out(path) if "gate" not in line] == done
    weights = (quick / "out" / "sft" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    other = {"train": str(quick / "recipe.yaml"), "from": "sft", "set": preferring(quick, rate=0.005)}
    path = write_flow(quick, dpo=other, good={"gate": "dpo", "require": "eval.loss < 0"})
    with pytest.raises(GateFailed, match=r"^gate good: eval.loss of dpo must be < 0, and is \d") as failed:
        carry_out(path)
    assert failed.value.exit_code == 4
    assert (quick / "out" / "sft" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == weights
    names = [mark["name"] for mark in json.loads((quick / "out" / "stages.json").read_text())["done"]]
    assert names == ["sft", "dpo", "score"]
    path = write_flow(quick, dpo=other)
    assert carry_out(path)[:3] == done[:3]  # and the merged model of before is replaced
    path = write_flow(quick)
    assert carry_out(path)[1] == (
        "stage dpo: changed: train.learning_rate 0.005 -> 0.01; it runs again, and those after it"
    )

    # What a stage wrote, and what it read.
    (quick / "out" / "merged" / "model.safetensors").write_bytes(b"")
    assert carry_out(path)[-2].endswith("merged/model.safetensors changed; it runs again")
    assert not [check for check in read_lineage(quick / "out" / "merged").all_checks() if not check.passed]
    with (quick / "rows.jsonl").open("a", encoding="utf-8") as rows:
        rows.write('{"prompt": "the sun", "completion": "is red"}\n')
    bad = {check.text.split()[0] for check in read_lineage(quick / "out" / "merged").all_checks() if not check.passed}
    assert bad == {"data:"}
    assert carry_out(path)[0].startswith(f"stage sft: changed: file {(quick / 'rows.jsonl').as_posix()}; it runs again")


def test_a_failed_proof_stops_the_flow(quick: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = write_flow(quick, sft={"train": str(quick / "recipe.yaml"), "set": {"train.learning_rate": 1e-30}})
    monkeypatch.setattr(sys, "argv", ["smidgen", "flow", str(path)])
    for _ in range(2):  # it is not tried again
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 4
        assert "error: stage sft: its proof failed" in capsys.readouterr().err
    assert not (quick / "out" / "dpo").exists()


def test_a_folder_in_use_is_left_alone(quick: Path):
    path = write_flow(quick)
    (quick / "out" / "sft").mkdir(parents=True)
    with pytest.raises(UsageError, match="is not empty, and no flow's folder"):
        carry_out(path)
    (quick / "out" / "stages.json").write_text("{}x")
    with pytest.raises(UsageError, match=r"stages\.json: not valid JSON"):
        carry_out(path)


def test_the_command_checks_without_running(quick: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smidgen", "flow", str(write_flow(quick)), "--check"])
    with pytest.raises(SystemExit) as left:
        main()
    assert not left.value.code and capsys.readouterr().out.splitlines()[1] == "dpo: train sft"
    assert not (quick / "out").exists()


# ---- killed in each stage ----


def kill_before(home: Any, name: str, at: Callable[..., bool]) -> Callable[[], None]:
    """Let a process kill itself (SIGKILL) where it is about to call this, if `at` answers so."""

    def arm() -> None:
        original = getattr(home, name)

        def call(*args: Any, **options: Any) -> Any:
            if at(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(home, name, call)

    return arm


def in_run(name: str, step: int) -> Callable[..., bool]:
    return lambda loop, *_: loop.folder.name == name and loop.step + 1 == step


MOMENTS: dict[str, Callable[[], None]] = {
    "sft, before its first checkpoint": kill_before(Loop, "_update", in_run("sft", 1)),
    "sft, training": kill_before(Loop, "_update", in_run("sft", 3)),
    "sft, proof": kill_before(proof_module, "write_record", lambda setup, *_: setup.recipe.output.endswith("sft")),
    "dpo, training": kill_before(Loop, "_update", in_run("dpo", 4)),
    "dpo, before its mark": kill_before(stages.Marks, "write", lambda marks, _: len(marks.done) == 2),
    "score": kill_before(stages, "paired_gain", lambda *_: True),
    "good": kill_before(stages, "_judge", lambda *_: True),
    "merged, before it appears": kill_before(save.os, "replace", lambda _, new: Path(new).name == "merged"),
    "merged, before its mark": kill_before(stages.Marks, "write", lambda marks, _: len(marks.done) == 4),
}


def in_process(path: Path, arm: Callable[[], None]) -> int | None:
    def action() -> None:
        torch.set_num_threads(1)
        arm()
        carry_out(path)

    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes that share what is patched are forked")
def test_a_flow_killed_in_each_stage_ends_with_the_same_model(quick: Path):
    (quick / "straight").mkdir()
    straight = write_flow(quick / "straight")
    assert in_process(straight, lambda: None) == 0
    (quick / "killed").mkdir()
    killed = write_flow(quick / "killed")
    for moment, arm in MOMENTS.items():
        assert in_process(killed, arm) == -signal.SIGKILL, moment
    seen = (quick / "killed" / "out" / "sft" / "log.jsonl").stat().st_mtime_ns
    assert in_process(killed, lambda: None) == 0
    assert (quick / "killed" / "out" / "sft" / "log.jsonl").stat().st_mtime_ns == seen
    for file in ("sft/adapter/adapter_model", "dpo/adapter/adapter_model", "merged/model"):
        one, other = (load_file(quick / name / "out" / f"{file}.safetensors") for name in ("straight", "killed"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), file
    assert all(check.passed for check in read_lineage(quick / "killed" / "out" / "merged").all_checks())
