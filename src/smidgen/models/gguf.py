"""Turns a GGUF file into a plain Hugging Face folder: config, safetensors weights, tokenizer, generation config.

Covered are the architectures of which every tensor and every setting is understood; anything else is refused by name
rather than converted halfway. Quantised weights are dequantised once and kept as bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from smidgen.errors import ModelError, did_you_mean
from smidgen.foreign import shown
from smidgen.models.gguf_header import check_header

FORMAT = 1  # part of cache names: raise it when the same file would be converted to another folder


@dataclass(frozen=True)
class _Architecture:
    """What Hugging Face calls an architecture, and whether llama.cpp re-orders its query and key rows for RoPE."""

    class_name: str
    permuted: bool


# Named as in `general.architecture`; the names are also transformers' model types.
_ARCHITECTURES = {
    "llama": _Architecture("LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("Qwen2ForCausalLM", permuted=False),
    "qwen3": _Architecture("Qwen3ForCausalLM", permuted=False),
}
_SETTINGS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
_IMPLIED = {"vocab_size", "rope.dimension_count", "attention.value_length", "attention.head_count_kv"}
# How text is cut before byte pairs are merged, by the names of `tokenizer.ggml.pre`. The patterns are the models' own.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(Regex(_LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
    "qwen2": [
        pre_tokenizers.Split(Regex(_LLAMA3.replace("{1,3}", "")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
_CONTROL, _USER_DEFINED = int(gguf.TokenType.CONTROL), int(gguf.TokenType.USER_DEFINED)


def convert(file: Path, folder: Path) -> None:
    """Write the model in `file` into the existing folder `folder`.

    Raises:
        ModelError: the file is no GGUF file, or of an architecture, setting, tokenizer or tensor not covered here.
    """
    with _opened(file) as opened:
        tokenizer, special = _tokenizer(file, opened.metadata)
        config = _config(file, opened.name, opened.metadata, opened.tensors, special)
        weights = _weights(file, opened.name, config, opened.tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(**special | {"eos_token_id": _stops(opened.metadata)}).save_pretrained(folder)


def describe(file: Path) -> tuple[PretrainedConfig, PreTrainedTokenizerFast, list[int]]:
    """Configuration, tokenizer and stop tokens of a GGUF file, from its header; no weight is read.

    Raises:
        ModelError: as `convert`.
    """
    with _opened(file) as opened:
        tokenizer, special = _tokenizer(file, opened.metadata)
        config = _config(file, opened.name, opened.metadata, opened.tensors, special)
        return config, tokenizer, _stops(opened.metadata)


@dataclass(frozen=True)
class _Opened:
    """A GGUF file: the name of its architecture, its fields and its tensors by name."""

    name: str
    metadata: dict[str, Any]
    tensors: dict[str, Any]


@contextmanager
def _opened(file: Path) -> Iterator[_Opened]:
    """Open a GGUF file of a covered architecture; what goes wrong with its fields inside the block is told."""
    check_header(file)
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # what a foreign file raises in the library is open
        raise ModelError(f"{file}: not a readable GGUF file: {shown(error)}") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    name = str(metadata.get("general.architecture", ""))
    if name not in _ARCHITECTURES:
        raise ModelError(
            f"{file}: architecture '{name}' is not covered{did_you_mean(name, _ARCHITECTURES)} Covered are "
            f"{', '.join(_ARCHITECTURES)}; for others give the model's Hugging Face folder or hub id."
        )
    try:
        yield _Opened(name, metadata, tensors)
    except ModelError:
        raise
    except Exception as error:  # fields that are absent, of another kind, or at odds with each other
        problem = f"{type(error).__name__} {shown(error)}"
        raise ModelError(f"{file}: its fields do not describe a {name} model: {problem}") from error


def _config(file: Path, name: str, metadata: dict, tensors: dict, special: dict[str, int]) -> PretrainedConfig:
    prefix = f"{name}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unknown = sorted(key for key in settings if key not in _SETTINGS and key not in _IMPLIED)
    if unknown:
        listed = ", ".join(f"{key}={settings[key]}" for key in unknown)
        raise ModelError(f"{file}: settings not covered for {name}: {listed}")
    if settings["block_count"] > len(tensors):
        raise ModelError(f"{file}: block_count is {settings['block_count']:,}, but there are {len(tensors):,} tensors")
    values = {_SETTINGS[key]: _number(value) for key, value in settings.items() if key in _SETTINGS}
    theta = values.pop("rope_theta", 10000.0)
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if settings.get(key, values["head_dim"]) != values["head_dim"]:
            raise ModelError(f"{file}: {key} is {settings[key]}, the head size {values['head_dim']}; they must agree")
    if name == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in tensors
    return AutoConfig.for_model(
        name,
        **values,
        **special,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        tie_word_embeddings="output.weight" not in tensors,
        architectures=[_ARCHITECTURES[name].class_name],
    )


def _number(value: int | float) -> int | float:
    """A GGUF float is a float32: 1e-5 is stored as 9.999999747e-06, and 7 digits give back what was meant."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _weights(file: Path, name: str, config: PretrainedConfig, tensors: dict) -> dict[str, torch.Tensor]:
    """Answer the tensors under their Hugging Face names. Files of float16 or float32 matrices keep their type."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()  # transformers 5.0 does not do so on the meta device
    parameters = dict(model.named_parameters())  # a tied head is listed once
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    sources = {str(names.get_name(key, (".weight", ".bias"))): key for key in parameters}
    problems = [f"{key}: not in the file" for key in sorted(sources.keys() - tensors.keys())]
    problems += [f"{key}: has no place in the model" for key in sorted(tensors.keys() - sources.keys())]
    if problems:
        listed = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ModelError(f"{file}: the tensors do not fit {_ARCHITECTURES[name].class_name}: {listed}")
    matrix = tensors["blk.0.attn_q.weight"].tensor_type.name
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(matrix, torch.bfloat16)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    weights = {}
    for source, key in sources.items():
        values = gguf.dequantize(tensors[source].data, tensors[source].tensor_type)
        layer = key.split(".")[-2]
        if _ARCHITECTURES[name].permuted and layer in heads:
            values = _unpermute(values, heads[layer])
        weights[key] = torch.from_numpy(np.require(values, requirements=["C", "W"])).to(dtype)
    return weights


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the query and key rows: pairs side by side there, half a head apart here."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tokenizer(file: Path, metadata: dict) -> tuple[PreTrainedTokenizerFast, dict[str, int]]:
    """Answer the byte-level BPE tokenizer of the file, and its bos, eos and pad ids as far as there are any."""
    field: Any = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
    kind, pre = field("model"), field("pre", "gpt-2")
    if kind != "gpt2" or pre not in _SPLITS:
        raise ModelError(
            f"{file}: tokenizer '{kind}' with the split '{pre}' is not covered. Covered is 'gpt2' with "
            f"{', '.join(_SPLITS)}; for others give the model's Hugging Face folder or hub id."
        )
    tokens, types = field("tokens"), field("token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    bos = field("bos_token_id")
    if field("add_bos_token", False):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )
    ids = {
        "bos_token": bos,
        "eos_token": field("eos_token_id"),
        "pad_token": field("padding_token_id"),
        "unk_token": field("unknown_token_id"),
    }
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=next(value for key, value in metadata.items() if key.endswith(".context_length")),
        clean_up_tokenization_spaces=False,
        **{key: tokens[index] for key, index in ids.items() if index is not None},
    )
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    special = {f"{key}_id": int(index) for key, index in ids.items() if index is not None and key != "unk_token"}
    return wrapped, special


def _stops(metadata: dict) -> list[int]:
    """Answer the ids that end a text or a turn."""
    ends = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return sorted({int(end) for end in ends if end is not None})
