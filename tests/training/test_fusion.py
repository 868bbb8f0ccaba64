"""A fusion from a recipe: trained over the adapters of two runs, saved with them, proved in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from smidgen.models.open import find, open_model
from smidgen.recipe import load_recipe
from smidgen.training.run import train
from tests.training.conftest import write_recipe


def run(folder: Path, adapter: dict[str, Any], seed: int) -> Any:
    folder.mkdir()
    path = write_recipe(folder, epochs=20, logging_steps=50)
    fields = yaml.safe_load(path.read_text())
    fields |= {"adapter": adapter, "seed": seed}
    path.write_text(yaml.safe_dump(fields))
    return train(load_recipe(path)[0], say=lambda line: None)


@pytest.mark.slow
def test_a_fusion_of_two_runs_is_proved(tmp_path: Path) -> None:
    bottleneck = {"method": "bottleneck", "reduction_factor": 4}
    for seed, name in enumerate(("first", "second")):
        run(tmp_path / name, bottleneck, seed)
    fused = [str(tmp_path / "first" / "run"), str(tmp_path / "second" / "run" / "adapter")]
    proof = run(tmp_path / "fusion", {"method": "fusion", "adapters": fused}, 3)
    assert [line for line, check in zip(proof.lines(), proof.checks, strict=False) if not check.passed] == []
    saved = tmp_path / "fusion" / "run" / "adapter"
    files = {str(path.parent.relative_to(saved)) for path in saved.rglob("adapter_model.safetensors")}
    assert files == {".", "run", "run-2"}
    model, _ = open_model(find(saved.parent), say=lambda line: None)
    assert model.peft_config["default"].adapters == ["run", "run-2"]
