"""What a recipe does by default learns a toy task: which words name animals, from sentences with one or the other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from smidgen.evaluation.compare import compare, read_examples
from smidgen.models.open import find, open_model
from smidgen.recipe import Source, load_recipe
from smidgen.training import proof, run
from tests.conftest import tiny_llama
from tests.training import conftest

KINDS = {"animal": "cat dog bird fish".split(), "thing": "ball tree car boat".split()}
AROUND = "saw found had liked wanted loved big small red blue old new nice today once there".split()
WORDS = [*KINDS, *KINDS["animal"], *KINDS["thing"], *AROUND]


def write_rows(folder: Path, held_out: int = 128) -> None:
    """Rows of two random words and a noun, and the noun's kind; those held out are not among the others."""
    chance = random.Random(0)
    rows = set()
    for _ in range(2000):
        kind = chance.choice(list(KINDS))
        rows.add((" ".join([*chance.sample(AROUND, 2), chance.choice(KINDS[kind])]), kind))
    lines = [json.dumps({"prompt": prompt, "completion": kind}) + "\n" for prompt, kind in sorted(rows)]
    chance.shuffle(lines)
    (folder / "train.jsonl").write_text("".join(lines[held_out:]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[:held_out]), encoding="utf-8")


def test_defaults_learn_a_toy_task(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof, "verify_afresh", lambda folder: [])  # takes seconds
    write_rows(tmp_path)
    words = [*conftest.WORDS[:4], *WORDS]  # the first four are special tokens
    monkeypatch.setattr(conftest, "WORDS", words)
    conftest.save_tiny_model(tmp_path / "base")
    # Random and wide: LoRA's usual learning rate is made for models that are not tiny.
    model: Any = tiny_llama(vocab_size=len(words), hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=0.03, generator=generator)
    model.save_pretrained(tmp_path / "base")
    recipe = {
        "model": str(tmp_path / "base"),
        "adapter": {"method": "lora"},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "train": {"max_steps": 400},
        "output": str(tmp_path / "run"),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    run.train(load_recipe(tmp_path / "recipe.yaml")[0], say=lambda line: None)
    tuned, tokenizer = open_model(find(tmp_path / "run"), say=lambda line: None)
    found = compare(tuned, tokenizer, read_examples(Source(str(tmp_path / "eval.jsonl")), None))
    assert found.rows == 128 and found.right["tuned"] > 0.95 * 128 and found.right["base"] < 0.1 * 128
