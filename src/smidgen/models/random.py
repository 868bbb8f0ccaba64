"""Models with random weights, to measure speed where none is at hand."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smidgen.models.load import quiet


def random_llama(dtype: torch.dtype) -> Any:
    """A Llama in evaluation mode whose blocks are those of SmolLM2-135M, six of them; the same weights every time."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=8192,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with quiet(), torch.random.fork_rng([]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()
