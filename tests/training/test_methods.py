"""Whole runs, proof and all, of the methods that are more than an update beside each weight."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from smidgen.cli.main import main
from smidgen.errors import UsageError
from smidgen.recipe import load_recipe
from smidgen.training.run import train
from smidgen.training.setup import prepare
from tests.training.conftest import write_recipe

METHODS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "the colour of",
    },
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4, "prefix_projection": True},
    "bottleneck": {"kind": "pfeiffer", "reduction_factor": 4},
    "adalora": {"init_r": 4, "target_r": 2, "tfinal": 5},
}


def recipe_of(folder: Path, method: str, **data: Any) -> Any:
    path = write_recipe(folder, epochs=20, logging_steps=50)
    fields = yaml.safe_load(path.read_text())
    fields["adapter"] = {"method": method} | METHODS[method]
    fields["data"] |= data
    path.write_text(yaml.safe_dump(fields))
    return load_recipe(path)[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_proved(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = train(recipe_of(tmp_path, method), say=lambda line: None)
    assert [line for line, check in zip(proof.lines(), proof.checks, strict=False) if not check.passed] == []
    texts = {check.name: check.text for check in proof.checks}
    assert "0/0" not in texts["acts"]
    if method in ("adalora", "bottleneck"):
        return
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["smidgen", "readout", str(tmp_path / "run"), "--count", "2"])
    try:
        main()
    except SystemExit as ended:
        assert ended.code == (2 if method == "prefix_tuning" else 0)
    told = capsys.readouterr()
    if method == "prefix_tuning":
        assert "the adapter has no soft tokens" in told.err
    else:
        lines = told.out.splitlines()
        shape = re.compile(r" +\d  '\S+' -?\d\.\d\d  '\S+' -?\d\.\d\d")
        assert len(lines) == 4 and all(map(shape.fullmatch, lines))


def test_rows_stay_apart_where_nothing_is_asked(tmp_path: Path) -> None:
    told: list[str] = []
    recipe = recipe_of(tmp_path, "prompt_tuning")
    assert not prepare(recipe, None, told.append).how.packing
    assert "packing: off (this method stands around whole rows)" in told


def test_packing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot each have a prompt before them: write packing: false"):
        train(recipe_of(tmp_path, "p_tuning", packing=True), say=lambda line: None)
    assert not (tmp_path / "run" / "log.jsonl").exists()
