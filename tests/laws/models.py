"""Tiny random models of every kind that adapters are tried on, each with what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from smidgen.adapters.config import TaskType
from tests.conftest import TINY, tiny_gpt2, tiny_llama, tokens

ENCODER = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.2,
    "pad_token_id": 1,
}
T5 = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {"vocab_size": 48, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0, "init_std": 0.2}
BART |= {
    f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in {"attention_heads": 4, "ffn_dim": 64}.items()
}
BART |= {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BLOOM = {"vocab_size": 48, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
VIT = {
    key: value for key, value in ENCODER.items() if key not in ("vocab_size", "max_position_embeddings", "pad_token_id")
}
VIT |= {"image_size": 8, "patch_size": 4, "num_labels": 5}


@dataclass(frozen=True)
class Kind:
    """A kind of model: what it is made to do, and how one is made, the same one each time."""

    task: TaskType
    build: Callable[[], Any]

    def inputs(self) -> dict[str, Tensor]:
        ids = tokens(vocabulary=48)
        if self.build().main_input_name == "pixel_values":
            return {"pixel_values": torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
        ids[:, -1] = 2  # BART's classifier answers at the end token
        decoded = {"decoder_input_ids": tokens(length=5)} if self.task == TaskType.SEQ_2_SEQ_LM else {}
        return {"input_ids": ids, **decoded}


def answer(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """All that a model says to its inputs, in one row of numbers."""
    found = model(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return torch.cat([found[name].flatten() for name in names if name in found and found[name] is not None])


def _kind(task: TaskType, name: str, config: str, **sizes: Any) -> Kind:
    def build() -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, name)(getattr(transformers, config)(**sizes)).eval()
        with torch.no_grad():  # biases start at zero, where a test of them could not fail
            for parameter_name, parameter in made.named_parameters():
                if parameter_name.endswith("bias"):
                    parameter.normal_(std=0.1)
        return made

    return Kind(task, build)


LM, S2S, CLS, TOK, QA, FEATURES = (
    TaskType.CAUSAL_LM,
    TaskType.SEQ_2_SEQ_LM,
    TaskType.SEQ_CLS,
    TaskType.TOKEN_CLS,
    TaskType.QUESTION_ANS,
    TaskType.FEATURE_EXTRACTION,
)
KINDS: dict[str, Kind] = {
    "Llama": Kind(LM, tiny_llama),
    "GPT-2": Kind(LM, tiny_gpt2),
    "Qwen2": _kind(LM, "Qwen2ForCausalLM", "Qwen2Config", **TINY),
    "Qwen3": _kind(LM, "Qwen3ForCausalLM", "Qwen3Config", **TINY, head_dim=8),
    "Mistral": _kind(LM, "MistralForCausalLM", "MistralConfig", **TINY),
    "Gemma": _kind(LM, "GemmaForCausalLM", "GemmaConfig", **TINY, head_dim=8),
    "Phi": _kind(LM, "PhiForCausalLM", "PhiConfig", **TINY, **NO_DROPOUT),
    "BLOOM": _kind(LM, "BloomForCausalLM", "BloomConfig", **BLOOM),
    "T5": _kind(S2S, "T5ForConditionalGeneration", "T5Config", **T5),
    "BART": _kind(S2S, "BartForConditionalGeneration", "BartConfig", **BART),
    "BERT": _kind(CLS, "BertForSequenceClassification", "BertConfig", **ENCODER, num_labels=5),
    "BERT scalar": _kind(CLS, "BertForSequenceClassification", "BertConfig", **ENCODER, num_labels=1),
    "RoBERTa": _kind(CLS, "RobertaForSequenceClassification", "RobertaConfig", **ENCODER, num_labels=5),
    "Llama classifier": _kind(CLS, "LlamaForSequenceClassification", "LlamaConfig", **TINY, num_labels=5),
    "GPT-2 classifier": _kind(
        CLS,
        "GPT2ForSequenceClassification",
        "GPT2Config",
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=48,
        pad_token_id=0,
    ),
    "BART classifier": _kind(CLS, "BartForSequenceClassification", "BartConfig", **BART, num_labels=5),
    "BERT tagger": _kind(TOK, "BertForTokenClassification", "BertConfig", **ENCODER, num_labels=5),
    "Llama tagger": _kind(TOK, "LlamaForTokenClassification", "LlamaConfig", **TINY, num_labels=5),
    "BERT reader": _kind(QA, "BertForQuestionAnswering", "BertConfig", **ENCODER),
    "RoBERTa reader": _kind(QA, "RobertaForQuestionAnswering", "RobertaConfig", **ENCODER),
    "BERT features": _kind(FEATURES, "BertModel", "BertConfig", **ENCODER),
    "RoBERTa features": _kind(FEATURES, "RobertaModel", "RobertaConfig", **ENCODER),
    "ViT": _kind(CLS, "ViTForImageClassification", "ViTConfig", **VIT),
}
