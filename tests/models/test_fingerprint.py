"""The fingerprint knows a base again in another dtype, and tells apart what differs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import smidgen
from smidgen.models.fingerprint import fingerprint, same_base
from tests.conftest import perturb, tiny_llama


@pytest.mark.parametrize("dtypes", [[torch.bfloat16], [torch.float16], [torch.float16, torch.float32], [torch.float64]])
def test_the_same_weights_in_another_dtype(dtypes: list[torch.dtype]) -> None:
    model = tiny_llama()
    here = fingerprint(model)
    for dtype in dtypes:
        model = model.to(dtype)
    assert same_base(fingerprint(model), here)


def test_adapters_do_not_count() -> None:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig())
    perturb(model)
    assert fingerprint(model) == fingerprint(tiny_llama())


@pytest.mark.parametrize(
    "path", ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
)
def test_other_weights_in_one_layer(path: str) -> None:
    model = tiny_llama()
    nn.init.normal_(model.get_submodule(path).weight, generator=torch.Generator().manual_seed(9))
    assert not same_base(fingerprint(model), fingerprint(tiny_llama()))


def test_weights_that_were_tuned_a_little() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    assert not same_base(fingerprint(model), fingerprint(tiny_llama()))


def test_another_structure_with_the_same_weights() -> None:
    model = tiny_llama()
    other = copy.deepcopy(model)
    other.config.num_attention_heads = 8
    assert not same_base(fingerprint(other), fingerprint(model))


@pytest.mark.parametrize("written", ["", "x", "a-b-c", "0" * 10_000])
def test_what_is_no_fingerprint_is_no_base(written: str) -> None:
    assert not same_base(written, fingerprint(tiny_llama()))
