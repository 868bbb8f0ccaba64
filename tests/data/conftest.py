"""Small tokenizers with chat templates shaped like the common families'."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? It is Paris.",
    "hello there, how are you today? I am fine, thank you. user assistant system think",
    "1 + 1 = 2, two and two are four; name the colours of the rainbow: red, orange, yellow.",
] * 4

# Written for these tests; each has the trait of its family that makes finding the answers hard.
LLAMA3 = (  # BOS from the template, header tokens, trimmed contents
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (  # BOS from the template, another name for the assistant, no system message, a line break after each turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
QWEN3 = (  # an empty think block before the last answer only, which the prompt of a thinking model does not have
    "{% for m in messages %}<|s|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}{% set answer = parts[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' }}\n</think>\n\n"
    "{% endif %}{{ answer }}{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>"
    "{% endfor %}{% endif %}{% else %}{{ m['content'] }}{% endif %}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)
R1 = (  # opens the reasoning in the prompt, leaves it out of finished answers
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
LLAMA2 = (  # a space that belongs to the answer's first token; the answer ends in EOS
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [/Q]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def _byte_level(special: list[str], bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    # Offsets without the leading space, as in GPT-2 and Llama 3.
    steps: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]))
    tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


def _metaspace(special: list[str], bos: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=560, special_tokens=["<unk>", *special, *fallback], show_progress=False)
    )
    plain = json.loads(tokenizer.to_str())  # the byte tokens must not be special: else they are found in texts
    plain["added_tokens"] = [token for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the traits of a family, small enough to be made for each test run."""
    if family == "llama3":
        core = _byte_level(["<bos>", "<|head|>", "<|/head|>", "<|eot|>", "<eos>"], "<bos>")
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<bos>", eos_token="<|eot|>", pad_token="<|eot|>", chat_template=LLAMA3
        )
    if family == "gemma":
        core = _metaspace(["<bos>", "<start>", "<end>"], "<bos>")
        return PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<bos>", eos_token="<end>", pad_token="<end>", chat_template=GEMMA
        )
    if family == "qwen3":
        core = _byte_level(["<|s|>", "<|e|>", "<pad>"], None)
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|e|>", pad_token="<pad>", chat_template=QWEN3)
    if family == "r1":
        core = _byte_level(["<bos>", "<|user|>", "<|assistant|>", "<|eot|>", "<think>"], "<bos>")
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<|eot|>", chat_template=R1)
    if family == "llama2":
        core = _metaspace(["<bos>", "</s>"], "<bos>")
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="</s>", chat_template=LLAMA2)
    if family == "plain":  # no template: a base model's tokenizer
        core = _byte_level(["<bos>", "<eos>"], "<bos>")
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")
    raise KeyError(family)


FAMILIES = ("llama3", "gemma", "qwen3", "r1", "llama2", "plain")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {family: make_tokenizer(family) for family in FAMILIES}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Write rows (or a text) to a file and answer its path."""

    def write_file(rows: list[Any] | str | bytes, name: str = "train.jsonl") -> str:
        path = tmp_path / name
        if isinstance(rows, list):
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return str(path)

    return write_file


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}
