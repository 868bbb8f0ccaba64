"""Every dtype of the base, from training to the merged model, without a cast error; the plan is told at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smidgen.export.merge import merge_to_folder
from smidgen.models.generate import generate_batch
from smidgen.models.open import find, open_model
from smidgen.recipe import load_recipe
from smidgen.training.run import train
from tests.training.conftest import write_recipe


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_train_eval_generate_reload_and_merge(dtype: str, tmp_path: Path) -> None:
    said: list[str] = []
    recipe, _ = load_recipe(write_recipe(tmp_path, dtype=dtype, max_steps=4, eval_steps=2))
    proof = train(recipe, say=said.append)
    assert proof.passed, proof.lines()
    assert any(f"dtype: {dtype} (as asked), adapters float32" in line for line in said)
    model, tokenizer = open_model(find(tmp_path / "run"), say=said.append)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
    assert dtypes == {getattr(torch, dtype)}
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "lora_" in name)
    assert generate_batch(model, tokenizer, [[1, 5, 6]], max_new_tokens=3)
    wide, tokenizer = open_model(find(tmp_path / "run"), "float32", say=said.append)
    assert merge_to_folder(wide, tokenizer, tmp_path / "merged", getattr(torch, dtype), say=said.append).passed
    merged, _ = open_model(find(tmp_path / "merged"), dtype, say=said.append)
    assert merged.dtype == getattr(torch, dtype)
