"""The methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig

from smidgen.adapters.config import PeftConfig
from smidgen.models.overview import markdown, overview
from smidgen.models.peft_model import get_peft_model
from smidgen.registry import METHODS
from tests.conftest import tiny_llama

ADAPTERS = {name: entry.load() for name, entry in METHODS.items() if not hasattr(entry.load(), "select")}


def smollm2() -> LlamaConfig:
    """The configuration of SmolLM2-135M."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )


def test_the_documents_hold_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert f"\n{markdown(overview(smollm2()))}\n" in page.read_text(encoding="utf-8")


def test_what_is_counted_is_what_a_real_model_trains() -> None:
    real: Any = tiny_llama()
    for line in overview(real.config):
        method, settings = line.entry.load(), line.entry.load().config_class
        if line.refused:
            assert line.trained is None and line.entry.name in ("bitfit", "shira", "miss", "fourierft")
        elif not hasattr(method, "select"):
            model = tiny_llama()
            for name in line.entry.example.get("adapters", ()):
                get_peft_model(model, METHODS["bottleneck"].load().config_class(), name)
            get_peft_model(model, settings(**line.entry.example))
            assert line.trained == sum(p.numel() for p in model.parameters() if p.requires_grad), line.entry.name
        elif line.entry.name == "full":
            assert line.trained == line.total == sum(p.numel() for p in tiny_llama().parameters())


def test_nothing_takes_memory() -> None:
    before = torch.get_default_device()
    config = LlamaConfig(num_hidden_layers=2, hidden_size=8192, intermediate_size=200_000, vocab_size=100_000)
    assert len(overview(config)) == len(METHODS)
    assert torch.get_default_device() == before


@pytest.mark.parametrize("name", ADAPTERS)
def test_files_are_those_of_peft_where_it_has_the_method(name: str) -> None:
    config: type[PeftConfig] = ADAPTERS[name].config_class
    assert (config.files == "peft") == (config.peft_type in peft.PeftType.__members__)
