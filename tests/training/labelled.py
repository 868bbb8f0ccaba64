"""Tiny encoders and rewriters with rows that they can learn, in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.laws.models import KINDS
from tests.training.conftest import WORDS

# The kind of model that is loaded for a task; its files hold no head.
BODIES = {
    "seq_cls": "BERT features",
    "token_cls": "BERT features",
    "question_ans": "BERT features",
    "seq_2_seq_lm": "T5",
}
_COLOURS = {"sky": "blue", "sea": "green", "sun": "red"}


def rows_of(task: str) -> list[dict[str, Any]]:
    """Some rows of a task over the words of the tiny tokenizer."""
    rows = []
    for thing, colour in _COLOURS.items():
        for start in ("what is the", "the", "one two", "three", "of the"):
            text = f"{start} {thing}"
            context = f"the {thing} is {colour} one two"
            first = context.index(colour)
            rows.append(
                {
                    "seq_cls": {"text": text, "label": colour},
                    "token_cls": {
                        "tokens": text.split(),
                        "tags": ["O" if word not in _COLOURS else "thing" for word in text.split()],
                    },
                    "question_ans": {
                        "question": f"what colour {thing}",
                        "context": context if start != "three" else "one two three",
                        "answers": {
                            "text": [colour] * (start != "three"),
                            "answer_start": [first] * (start != "three"),
                        },
                    },
                    "seq_2_seq_lm": {"source": text, "target": f"{colour} {thing}"},
                }[task]
            )
    return rows


def save_body(task: str, folder: Path) -> Path:
    """A tiny random model without a head, with a tokenizer of a few words that puts <s> and </s> around texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special)
    model = KINDS[BODIES[task]].build()
    model.config.update({"pad_token_id": 0, "decoder_start_token_id": 0})
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_task_recipe(task: str, folder: Path, rows: list[dict[str, Any]] | None = None, **fields: Any) -> Path:
    """A recipe of a task over such a model and such rows; the held-out rows are the training rows."""
    rows = rows or rows_of(task)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": str(save_body(task, folder / "base")),
        "task": task,
        "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "data": {"train": str(data), "eval": str(data), "max_length": 32},
        "train": {"batch_size": 5, "learning_rate": 0.02, "epochs": 12, "dtype": "float32", "logging_steps": 6},
        "output": str(folder / "run"),
    } | fields
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
