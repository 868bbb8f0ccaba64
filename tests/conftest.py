"""Small models that every part of the tests shares."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

# The same examples in every run; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


class Toy(nn.Module):
    """One layer of every kind that has a weight, in a row: tokens in, numbers out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 4, (3, 2), stride=2, bias=False)
        self.conv3 = nn.Conv3d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv1(self.embed(tokens).transpose(1, 2))  # (B, 8, T)
        x = self.conv2(x.unsqueeze(1))  # (B, 4, h, w)
        x = self.conv3(x.unsqueeze(2)).squeeze(2)
        x = self.norm(x.flatten(2).transpose(1, 2))  # (B, n, 4)
        return self.head(torch.tanh(self.linear(x)))


# The sizes of tiny models of Llama's kin.
TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_llama(tied: bool = False, bias: bool = False, **options: int) -> nn.Module:
    """A random Llama of 2 layers in fp32, the same one each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY | options,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # biases start at zero, where a test of them could not fail
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def tiny_gpt2() -> nn.Module:
    """A random GPT-2 of 2 layers in fp32: its linear layers store their weight transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    return GPT2LMHeadModel(config).eval()


def tiny_bert() -> nn.Module:
    """A random BERT of 2 layers that labels each token: its norms follow the sums."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 5}
    config = BertConfig(**sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0, initializer_range=0.2)
    return BertForTokenClassification(config).eval()


def toy() -> nn.Module:
    """A `Toy`, the same one each time."""
    torch.manual_seed(0)
    return Toy().eval()


def tokens(rows: int = 3, length: int = 12, vocabulary: int = 20) -> Tensor:
    """Token ids (rows, length), the same each time."""
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's answer to `ids`, a tensor for models of transformers and plain ones alike."""
    answer = model(ids)
    return answer if isinstance(answer, Tensor) else answer.logits


def perturb(model: nn.Module, seed: int = 5, scale: float = 0.1) -> None:
    """Move every trainable parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data and small real models."""
    folder = os.environ.get("SMIDGEN_TEST_DATA")
    if not folder:
        pytest.skip("SMIDGEN_TEST_DATA is not set: tests on real data and models are skipped")
    return Path(folder)


@pytest.fixture(scope="session")
def stories260k(test_data: Path) -> Path:
    """A real Llama of 260K parameters that tells stories."""
    return test_data / "models" / "stories260k"
