"""Conversion against files written here with gguf's own writer, in the layout that llama.cpp documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from smidgen.errors import ModelError
from smidgen.models.gguf import convert
from smidgen.models.resolve import BUILT_IN, resolve_model
from tests.models.conftest import TEMPLATE, byte_tokenizer

SIZES: Any = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order: row 2 i + h of a head is row i + h * half of Hugging Face's."""
    size = weight.shape[0] // heads
    half = size // 2
    rows = [head * size + i + h * half for head in range(heads) for i in range(half) for h in range(2)]
    return weight[rows]


def write(path: Path, name: str, *, tied: bool = False, quantise: bool = False, **extra: Any) -> torch.nn.Module:
    """Write a random model as GGUF and answer it."""
    torch.manual_seed(1)
    config = CONFIGS[name](
        **SIZES, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 5e4}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases are not left at their trivial values
        torch.nn.init.normal_(parameter, 0.5 if parameter.dim() == 1 else 0.0, 0.2)
    writer = gguf_package.GGUFWriter(path, name)
    writer.add_context_length(128)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    for key, value in extra.items():
        writer.add_uint32(f"{name}.{key}", value)
    tokens = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    tokens += ["ab", "12", "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))  # three control tokens
    writer.add_token_merges(["a b", "1 2", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf_package.get_tensor_name_map(gguf_package.MODEL_ARCH[name.upper()], 2)
    for key, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        if name == "llama" and ("q_proj" in key or "k_proj" in key):
            array = permuted(array, 4 if "q_proj" in key else 2)
        kind = gguf_package.GGMLQuantizationType.Q8_0
        if quantise and array.ndim == 2:
            packed = gguf_package.quantize(array, kind)
            writer.add_tensor(str(names.get_name(key, (".weight", ".bias"))), packed, raw_dtype=kind)
        else:
            writer.add_tensor(str(names.get_name(key, (".weight", ".bias"))), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_same_logits_as_what_was_written(tmp_path: Path, name: str, tied: bool):
    model = write(tmp_path / "m.gguf", name, tied=tied)
    (out := tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", out)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_quantised_weights_become_bfloat16(tmp_path: Path):
    model = write(tmp_path / "m.gguf", "llama", quantise=True)
    (out := tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", out)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for key, parameter in model.named_parameters():
        assert torch.allclose(loaded.get_parameter(key).float(), parameter, atol=0.012, rtol=0.006), key


def test_tokenizer(tmp_path: Path):
    write(tmp_path / "m.gguf", "llama")
    (out := tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    # Digits stay single although the file has a merge for "1 2"; two spaces before a digit stay together.
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab 12  3").input_ids) == ["ab", "Ġ", "1", "2", "ĠĠ", "3"]
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[::2] == [1, 2]
    for text in ("naïve 日本語 🎉\n\n\tx", " leading", "a  b "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.chat_template == TEMPLATE
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == [0, 2]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"expert_count": 4}, "settings not covered for llama: expert_count=4"),
        ({"rope.dimension_count": 8}, "rope.dimension_count is 8, the head size 16"),
    ],
)
def test_settings_that_would_be_lost_are_refused(tmp_path: Path, extra: dict[str, int], words: str):
    write(tmp_path / "m.gguf", "llama", **extra)
    with pytest.raises(ModelError, match=words):
        convert(tmp_path / "m.gguf", tmp_path)


def test_unknown_architectures_and_other_files_are_refused(tmp_path: Path):
    writer = gguf_package.GGUFWriter(tmp_path / "m.gguf", "lama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'lama' is not covered; did you mean 'llama'"):
        convert(tmp_path / "m.gguf", tmp_path)
    (tmp_path / "text.gguf").write_text("no GGUF at all, but long enough to be looked at", encoding="utf-8")
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        convert(tmp_path / "text.gguf", tmp_path)


def test_the_built_in_model_knows_the_capital_of_france(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smidgen.models.resolve._from_wheel", lambda *_: pytest.skip("not in the cache"))
    folder = resolve_model(next(iter(BUILT_IN)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer("12345").input_ids) == list("12345")
