"""Small rows, and loops over tiny models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from torch import nn

from smidgen.adapters.methods.lora import LoraConfig
from smidgen.data.preference_rows import LabelledRows, PairRows, mismatch
from smidgen.data.rows import TokenRows
from smidgen.models.peft_model import get_peft_model
from smidgen.recipe import TrainRecipe
from smidgen.training.loop import Loop
from smidgen.training.objectives import Collating, Objective
from tests.conftest import tiny_llama

TRAIN = TrainRecipe(batch_size=4, learning_rate=1e-2, logging_steps=1, max_steps=4, lr_scheduler_type="constant")


def make_rows(lengths: Sequence[int], prompt: int = 1, seed: int = 0, vocabulary: int = 48) -> TokenRows:
    """Rows of random tokens with these lengths; all but the first `prompt` tokens of each are learned."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    learned = np.ones(offsets[-1], dtype=bool)
    for start in offsets[:-1]:
        learned[start : start + prompt] = False
    count = len(lengths)
    return TokenRows(
        ids=random.integers(3, vocabulary, offsets[-1]).astype(np.int32),
        learned=learned,
        offsets=offsets,
        file=np.zeros(count, dtype=np.int32),
        line=np.arange(1, count + 1),
        state=np.zeros(count, dtype=np.uint8),
        digest=np.arange(count, dtype=np.uint64),
        files=("rows.jsonl",),
        order=np.arange(count),
    )


def make_pairs(lengths: Sequence[tuple[int, int]], prompts: Sequence[int], seed: int = 0) -> PairRows:
    """Pairs of random tokens: of each the lengths of the chosen and the rejected row, and of the prompt they share."""
    rows = make_rows([length for pair in lengths for length in pair], seed=seed)
    for index, prompt in enumerate(prompts):
        start, other = rows.offsets[2 * index], rows.offsets[2 * index + 1]
        rows.ids[other : other + prompt] = rows.ids[start : start + prompt]
        rows.learned[start : start + prompt] = rows.learned[other : other + prompt] = False
    return PairRows(rows, np.zeros(len(lengths)))


def make_labelled(pairs: PairRows) -> LabelledRows:
    """Each answer of the pairs as a row of its own, with its label."""
    return LabelledRows(pairs.rows, np.tile([True, False], len(pairs)), mismatch(pairs.rows))


def tiny_lora(dropout: float = 0.0, seed: int = 3) -> Any:
    """A tiny Llama with LoRA of rank 4 on all linear layers."""
    model = tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))


def make_loop(
    model: nn.Module,
    rows: Any,
    folder: Path,
    *,
    budget: int = 64,
    packing: bool = False,
    objective: Objective | None = None,
    held_out: Any = None,
    **train: Any,
) -> Loop:
    """A loop over `rows`, with fields of the train recipe as keywords."""
    torch.manual_seed(11)
    folder.mkdir(exist_ok=True)
    return Loop(
        model=model,
        objective=objective or Objective(),
        rows=rows,
        held_out=held_out,
        train=replace(TRAIN, **train),
        how=Collating(budget, packing, 0),
        seed=1,
        folder=folder,
        accelerator=Accelerator(cpu=True),
    )


WORDS = ["<pad>", "<s>", "</s>", "<unk>", *"red green blue one two three sky sea sun is the of colour what".split()]


def save_tiny_model(folder: Path) -> Path:
    """A tiny random Llama with a tokenizer of a few words, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model: Any = tiny_llama(tied=True, vocab_size=len(WORDS))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, **train: Any) -> Path:
    """A recipe over a tiny model and a few rows of which the model can learn the answer."""
    model = save_tiny_model(folder / "base")
    rows = [
        {"prompt": f"what is the colour of the {thing}", "completion": colour}
        for thing, colour in (("sky", "blue"), ("sea", "green"), ("sun", "red"), ("one", "two three"))
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 6), encoding="utf-8")
    fields = {"batch_size": 8, "learning_rate": 0.02, "epochs": 4, "dtype": "float32", "logging_steps": 2} | train
    recipe = {
        "model": str(model),
        "adapter": {"method": "lora", "r": 4, "target_modules": "all-linear"},
        "data": {"train": str(data), "eval_size": 4, "max_length": 32},
        "train": fields,
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
