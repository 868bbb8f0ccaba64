"""Tiny vision-language models, and rows of small images."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
)

from smidgen.data.prepare import Prepared, prepare_data
from smidgen.models.images import reader_of
from smidgen.models.load import load_model, stop_token_ids
from smidgen.recipe import DataRecipe, Source

RECIPES = Path(__file__).parents[2] / "recipes"


def script() -> ModuleType:
    """`recipes/digits.py` as a module."""
    spec = importlib.util.spec_from_file_location("digits", RECIPES / "digits.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DIGITS = script()


def write_idefics3(folder: Path) -> None:
    """A random Idefics3, SmolVLM's shape: an image is a column of marks between other tokens, and may be in tiles."""
    torch.manual_seed(0)
    _, tokenizer = DIGITS.tiny_language()
    tokenizer.add_tokens(["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"], special_tokens=True)
    tokenizer.add_tokens([f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 16, "patch_size": 4, "initializer_range": 0.2}
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=4, tie_word_embeddings=False
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "Idefics3ImageProcessor",
        "size": {"longest_edge": 32},
        "max_image_size": {"longest_edge": 16},
        "do_image_splitting": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    processor = Idefics3Processor(
        AutoImageProcessor.from_pretrained(folder), tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(folder)


WRITE: dict[str, Callable[[Path], None]] = {"llava": DIGITS.write_model, "idefics3": write_idefics3}


@pytest.fixture(scope="session", params=WRITE)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a vision-language model, of each shape."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    WRITE[request.param](folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LLaVA."""
    folder = tmp_path_factory.mktemp("one") / "model"
    DIGITS.write_model(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    return load_model(folder, "float32", say=lambda line: None)


def write_images(folder: Path, count: int = 4, seed: int = 0) -> list[str]:
    """Images of random pixels, every second one wide; answer their names."""
    random = torch.Generator().manual_seed(seed)
    names = [f"{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        shape = (16, 16 * (1 + index % 2), 3)
        Image.fromarray(torch.randint(256, shape, generator=random, dtype=torch.uint8).numpy()).save(folder / name)
    return names


def chat(images: Sequence[str], answer: str, asked: str = "which digit is this ?") -> dict[str, Any]:
    """A row that names its images in the parts of its message."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": name} for name in images]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": asked}]}
    return {"messages": [user, {"role": "assistant", "content": answer}]}


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepared(model: Any, tokenizer: Any, path: Path, **options: Any) -> Prepared:
    """The rows of a file, as a run makes them for this model."""
    return prepare_data(
        DataRecipe(train=[Source(str(path))], **options),
        tokenizer,
        stop_ids=stop_token_ids(model, tokenizer),
        images=reader_of(model),
    )
