"""``smidgen plan``: what it prints."""

from __future__ import annotations

from tests.cli.test_use import smidgen
from tests.training.conftest import write_recipe


def test_the_table_names_ways_parts_and_what_fits(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    recipe = write_recipe(tmp_path)
    assert smidgen(monkeypatch, "plan", recipe, "--device", "cpu") == 0
    told = capsys.readouterr().out
    for part in ("lora *", "lora nf4", "weights", "libraries", "peak", "1,000 tokens", "the run", "full: fits into"):
        assert part in told, part
    assert not (tmp_path / "run").exists()
    assert smidgen(monkeypatch, "plan", recipe, "--memory", "500MB") == 0
    assert "lora: does not fit into 500.0 MB, nor with any change" in capsys.readouterr().out


def test_an_unknown_card_is_told(tmp_path, monkeypatch, capsys):
    assert smidgen(monkeypatch, "plan", write_recipe(tmp_path), "--device", "H10") == 2
    assert "did you mean 'h100'?" in capsys.readouterr().err
