"""A tuned model stops: the end token is learned, also where the tokenizer pads with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from smidgen.data import encode_prompt
from smidgen.models.open import find, open_model
from smidgen.recipe import load_recipe
from smidgen.training.run import train
from tests.training.conftest import write_recipe


@pytest.mark.slow
def test_eight_rows_learned_by_heart_end_with_the_end_token_in_eight_of_eight(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, epochs=60, batch_size=8, logging_steps=50)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "base")
    things, answers = "sky sea sun one two three red blue".split(), "blue green red two three one sun sky".split()
    rows = [{"prompt": f"what is {t}", "completion": f"the {a}"} for t, a in zip(things, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"].pop("eval_size")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(load_recipe(path)[0], say=lambda line: None)

    model, tokenizer = open_model(find(tmp_path / "run"), say=lambda line: None)
    ended = 0
    for row in rows:
        prompt = encode_prompt([{"role": "user", "content": row["prompt"]}], tokenizer)
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        ended += answer[-1] == tokenizer.eos_token_id and tokenizer.decode(answer[:-1]).strip() == row["completion"]
    assert ended == 8
