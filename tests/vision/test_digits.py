"""The recipe of docs/vision.md as it stands: digits are read by a model that never saw one."""

from __future__ import annotations

import pytest
import torch

from smidgen.evaluation.compare import compare, read_examples
from smidgen.export.merge import merge_to_folder
from smidgen.models.open import find, open_model
from smidgen.recipe import Source, load_recipe
from smidgen.training.run import train
from tests.vision.conftest import DIGITS, RECIPES


@pytest.mark.slow
def test_digits_are_read(tmp_path, monkeypatch):
    """Chance is 10 of 100."""
    pytest.importorskip("sklearn")
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    DIGITS.write_digits(tmp_path / "digits")
    DIGITS.write_model(tmp_path / "digits" / "model")
    result = train(load_recipe(RECIPES / "digits.yaml", ["train.epochs=6"])[0], say=lambda line: None)
    assert result.passed, result.lines()
    tuned, tokenizer = open_model(find("runs/digits"), "float32", say=lambda line: None)
    held_out = list(read_examples(Source("digits/eval.jsonl"), 200))
    found = compare(tuned, tokenizer, held_out, few_shot=held_out[:1])
    assert found.right["tuned"] > 160 and found.right["base"] < 40
    parity = merge_to_folder(tuned, tokenizer, tmp_path / "merged", torch.float32, lambda line: None)
    assert parity.passed and parity.prompts == 9  # of texts, and one about an image
