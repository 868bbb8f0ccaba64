"""What one does with a run: inspect, generate, chat, merge; each on a run folder, an adapter folder and a model."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from smidgen.cli.main import main
from smidgen.errors import SmidgenError
from tests.training.conftest import write_recipe

ASK = "what is the colour of the sky"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over a tiny model that learned its few rows."""
    from smidgen.recipe import load_recipe
    from smidgen.training.run import train

    folder = tmp_path_factory.mktemp("use")
    train(load_recipe(write_recipe(folder, epochs=15, logging_steps=50))[0], say=lambda line: None)
    return folder / "run"


def smidgen(monkeypatch: pytest.MonkeyPatch, *arguments: object, stdin: str = "") -> int:
    monkeypatch.setattr("sys.argv", ["smidgen", *map(str, arguments)])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_inspect(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert smidgen(monkeypatch, "inspect", run) == 0
    told = capsys.readouterr().out
    assert "method: lora" in told and "r 4" in told
    assert f"base: {run.parent / 'base'} (fingerprint " in told
    assert "sits at 14 modules: " in told and "q_proj x2" in told
    assert "moves: 14 of 14 modules\n" in told
    assert "proof: ok   reload: loss of" in told
    assert smidgen(monkeypatch, "inspect", run.parent / "base") == 0
    assert "model: llama" in capsys.readouterr().out
    assert smidgen(monkeypatch, "inspect", run.parent) == 2
    assert "neither a run, an adapter nor a model" in capsys.readouterr().err


def test_generate(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert smidgen(monkeypatch, "generate", run, ASK, "what is the colour of one") == 0
    assert capsys.readouterr().out == "blue\ntwo three\n"
    assert smidgen(monkeypatch, "generate", run / "adapter", stdin=f"{ASK}\n") == 0
    assert capsys.readouterr().out == "blue\n"
    assert smidgen(monkeypatch, "generate", run, ASK, "--adapter", "off") == 0
    off = capsys.readouterr().out
    assert off != "blue\n"
    assert smidgen(monkeypatch, "generate", run.parent / "base", ASK, "--system", "") == 0
    assert smidgen(monkeypatch, "generate", run, ASK, "--adapter", "maybe") == 2
    assert smidgen(monkeypatch, "generate", run) == 2


def test_chat(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert smidgen(monkeypatch, "chat", run, stdin=f"{ASK}\n/new\n\n/off\n/on\n/new\n{ASK}\n/quit\nnever\n") == 0
    lines = capsys.readouterr().out.splitlines()
    talks = ["a new talk, adapter on", "a new talk, adapter off", "a new talk, adapter on", "a new talk, adapter on"]
    assert lines[1:] == ["blue", *talks, "blue"]


def test_merge(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert smidgen(monkeypatch, "merge", run, tmp_path / "merged", "--dtype", "float32") == 0
    assert "parity on 8 prompts" in capsys.readouterr().out
    assert smidgen(monkeypatch, "generate", tmp_path / "merged", ASK) == 0
    assert capsys.readouterr().out == "blue\n"
    assert smidgen(monkeypatch, "merge", run, tmp_path / "merged") == 2
    assert "is not empty" in capsys.readouterr().err
    assert smidgen(monkeypatch, "merge", run.parent / "base", tmp_path / "other") == 2
    assert "no adapter in it to merge" in capsys.readouterr().err
    assert smidgen(monkeypatch, "merge", run, tmp_path / "other", "--dtype", "int8") == 2


def test_a_run_that_has_not_ended_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    for command in ("generate", "chat", "merge"):
        more = [tmp_path / "out"] if command == "merge" else []
        assert smidgen(monkeypatch, command, tmp_path, *more, stdin=f"{ASK}\n") == 2
        assert "it has not ended" in capsys.readouterr().err


def test_errors_are_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smidgen(monkeypatch, "generate", "no-such-model", ASK) == 2
    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and "Traceback" not in told
    monkeypatch.setattr("sys.argv", ["smidgen", "--debug", "generate", "no-such-model", ASK])
    with pytest.raises(SmidgenError):
        main()


def test_convert_and_extract(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert smidgen(monkeypatch, "convert", run, tmp_path / "converted", "--rank", "4") == 0
    told = capsys.readouterr().out
    assert "q_proj x2: rank 4 keeps 100.00% of the update's norm" in told and "same greedy tokens 8/8" in told
    assert smidgen(monkeypatch, "merge", run, tmp_path / "merged", "--dtype", "float32") == 0
    models = run.parent / "base", tmp_path / "merged"
    assert smidgen(monkeypatch, "extract", *models, tmp_path / "out", "--rank", "4") == 0
    assert "all x14: rank 4 keeps 100.00%" in capsys.readouterr().out
    for folder in ("converted", "out"):
        assert smidgen(monkeypatch, "generate", tmp_path / folder, ASK) == 0
        assert capsys.readouterr().out == "blue\n"
    assert smidgen(monkeypatch, "convert", run, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert smidgen(monkeypatch, "convert", run.parent / "base", tmp_path / "other") == 2
    assert "no adapter in it to convert" in capsys.readouterr().err
