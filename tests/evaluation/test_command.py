"""``smidgen evaluate`` on a run folder of a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from smidgen import LoraConfig, get_peft_model
from smidgen.cli.evaluate import evaluate
from smidgen.errors import UsageError
from smidgen.models.load import load_model


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    model, tokenizer = load_model(folder, "float32", device=torch.device("cpu"), say=lambda line: None)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "run" / "adapter")
    tokenizer.save_pretrained(tmp_path / "run" / "adapter")
    rows = [[{"role": "user", "content": c}, {"role": "assistant", "content": c}] for c in "abcde"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(folder),
        "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj"]},
        "data": {"train": str(data), "eval": str(data)},
        "train": {"dtype": "float32"},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "adapter"])
def test_a_run_and_its_adapter_folder(run: Path, place: str, capsys: pytest.CaptureFixture[str]):
    evaluate(run / place, limit=4, few_shot=2)
    *_, summary, chat = capsys.readouterr().out.splitlines()
    assert summary == "exact match on 4 held-out rows: base 0.0 % (few-shot 0.0 %) -> tuned 0.0 %"
    assert chat == f"chat with it: smidgen chat {run / place}"


def test_what_is_missing_is_told(run: Path):
    with pytest.raises(UsageError, match="holds no adapter"):
        evaluate(run.parent)
    (run / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match="--data FILE is needed"):
        evaluate(run / "adapter")
