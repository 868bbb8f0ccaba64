from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.cli import main as frame
from smidgen.errors import RecipeError, TrainingStopped
from smidgen.registry import METHODS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "smidgen", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Puts a command called 'methods' in place of the real one."""

    def replace(function):
        function.__name__ = "methods"
        monkeypatch.setattr("smidgen.cli.methods.methods", function)
        monkeypatch.setattr(sys, "argv", ["smidgen", "methods"])

    import smidgen.cli.methods  # noqa: F401

    return replace


def leave() -> int | str | None:
    with pytest.raises(SystemExit) as left:
        frame.main()
    return left.value.code


def test_help_lists_each_command_with_its_line():
    lines = {" ".join(line.split()) for line in run("--help").stdout.splitlines()}
    for name in frame.COMMANDS:
        assert f"{name} {frame.summary(name)}" in lines
        assert frame.summary(name).endswith(".")


def test_every_command_is_listed():
    commands = {
        path.stem
        for path in Path(frame.__file__).parent.glob("*.py")
        if f"\ndef {path.stem}(" in path.read_text(encoding="utf-8") and path.stem != "main"
    }
    assert commands == set(frame.COMMANDS)


def test_methods_prints_the_registry():
    told = run("methods").stdout
    for entry in METHODS.values():
        assert entry.name in told and entry.paper in told


def test_version():
    assert run("--version").stdout.strip() == "smidgen 0.1.0"


def test_a_misspelt_command_is_told():
    told = run("metods")
    assert told.returncode == 2
    assert "no command 'metods'; did you mean 'methods'?" in told.stderr


@pytest.mark.parametrize(("error", "code"), [(RecipeError("r.yaml:7: bad"), 2), (TrainingStopped("nan"), 3)])
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code):
    def fails():
        raise error

    command(fails)
    assert leave() == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_debug_shows_the_traceback(command, monkeypatch):
    def fails():
        raise RecipeError("bad")

    command(fails)
    monkeypatch.setattr(sys, "argv", ["smidgen", "methods", "--debug"])
    with pytest.raises(RecipeError):
        frame.main()


def test_an_interrupt_leaves_with_130(command):
    def interrupted():
        raise KeyboardInterrupt

    command(interrupted)
    assert leave() == 130


def test_a_command_has_options_from_its_signature(command, monkeypatch, capsys):
    def counted(recipe: str, times: int = 3):
        print(recipe * times)

    command(counted)
    monkeypatch.setattr(sys, "argv", ["smidgen", "methods", "ab", "--times", "2"])
    assert leave() == 0
    assert capsys.readouterr().out == "abab\n"
