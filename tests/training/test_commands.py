"""``smidgen check`` and ``smidgen train``: what they show, and their exit codes."""

from __future__ import annotations

import sys

import pytest

from smidgen.cli.main import main
from tests.training.conftest import write_recipe


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["smidgen", *arguments])
        try:
            main()
        except SystemExit as left:
            return int(left.code or 0)
        return 0

    return call


def test_check_shows_everything_and_trains_nothing(tmp_path, command, capsys):
    recipe = write_recipe(tmp_path)
    assert command("check", str(recipe), "train.gradient_checkpointing=true") == 0
    shown = capsys.readouterr().out
    for part in (
        "data: train 20 rows",
        "tokens per row:",
        "⟦",
        "targets: q_proj 2",
        "trainable: ",
        "memory: ",
        "time: ",
    ):
        assert part in shown, part
    assert not (tmp_path / "run").exists()


def test_check_names_targets_that_are_not_there(tmp_path, command, capsys):
    assert command("check", str(write_recipe(tmp_path)), "adapter.target_modules=[q_pro]") == 2
    assert "q_proj" in capsys.readouterr().err


def test_check_fails_where_the_run_does_not_fit(tmp_path, command, capsys, monkeypatch):
    monkeypatch.setattr("smidgen.training.plan.free_memory", lambda device: 1000)
    assert command("check", str(write_recipe(tmp_path)), "train.micro_batch_tokens=512") == 2
    told = capsys.readouterr()
    assert "fits: no (needs" in told.out and "Smallest change: train.gradient_checkpointing=true" in told.out


@pytest.mark.slow
def test_train_writes_the_report_and_leaves_with_1_where_the_proof_fails(tmp_path, command, capsys):
    recipe = str(write_recipe(tmp_path))
    assert command("train", recipe) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page and "adapter moved: 28/28" in page
    assert command("train", recipe, "train.learning_rate=1e-30", "train.max_steps=2", "--overwrite") == 1
    assert "FAIL adapter moved: " in capsys.readouterr().out
    assert "failed" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_train_refuses_a_folder_in_use(tmp_path, command, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine", encoding="utf-8")
    assert command("train", str(write_recipe(tmp_path))) == 2
    assert "holds more than a run (notes.txt)" in capsys.readouterr().err
