"""Makes what `digits.yaml` trains: scikit-learn's digits as PNG files, and a vision-language model that never saw one.

    python recipes/digits.py                         a tiny language half with random weights
    python recipes/digits.py --language FOLDER       that language model as the language half, such as SmolLM2-135M

The model is a LLaVA with a random vision encoder and projector. Everything is written into `digits/`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

SIZE, PATCH = 16, 4  # pixels
WORDS = "<pad> <s> </s> <unk> <image> user assistant which digit is this ? 0 1 2 3 4 5 6 7 8 9".split()
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' }}{% for part in message.content %}"
    "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt else '' }}"
)


def write_digits(folder: Path, held_out: int = 360) -> None:
    """Write `train.jsonl` and `eval.jsonl`, rows of a chat about one image each, and the images."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"images/{index}.png"
        Image.fromarray((pixels * 15).astype("uint8")).save(folder / path)
        asked = [{"type": "image", "path": path}, {"type": "text", "text": "which digit is this ?"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(digit)}]
        lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "train.jsonl").write_text("".join(lines[held_out:]), encoding="utf-8")
    (folder / "eval.jsonl").write_text("".join(lines[:held_out]), encoding="utf-8")


def tiny_language() -> tuple[Any, Any]:
    """A random Llama of two layers, and a tokenizer of a few words whose template reads content in parts."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config), tokenizer


def write_model(folder: Path, language: str | None = None) -> None:
    """Write a LLaVA with its processor: a random vision encoder and projector before a language model."""
    torch.manual_seed(0)
    if language:
        half: Any = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(language)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        half.resize_token_embeddings(len(tokenizer))
    else:
        half, tokenizer = tiny_language()
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=half.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=bool(half.config.tie_word_embeddings),
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(half.model.state_dict())
    model.lm_head.load_state_dict(half.lm_head.state_dict())
    model.generation_config = half.generation_config
    model.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    settings = {"image_processor_type": "SiglipImageProcessor", "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    LlavaProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language", help="the folder of a causal language model of Llama's kin")
    parser.add_argument("--output", type=Path, default=Path("digits"))
    options = parser.parse_args()
    write_digits(options.output)
    write_model(options.output / "model", options.language)
