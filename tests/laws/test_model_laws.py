"""What must hold for a method with its own defaults on every kind of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import smidgen
from smidgen.adapters.base import Adapter, OnModel
from smidgen.adapters.config import TASK_HEADS
from smidgen.errors import TargetError
from smidgen.models.tasks import task_of
from smidgen.registry import METHODS
from tests.conftest import perturb
from tests.laws.cases import ADALORA, CASES, NOT_IDENTITY_AT_START, NOT_MERGEABLE, excepted
from tests.laws.models import KINDS, answer

# What a method needs for layers as narrow as these; its targets are its own.
SIZES = {
    "adalora": ADALORA,
    "boft": {"boft_block_size": 4},
    "fourierft": {"n_frequency": 50, "init_weights": True},
    "oft": {"oft_block_size": 8},
    "lora": {"r": 4},
    "miss": {"r": 8},
    "randlora": {"r": 8, "randlora_alpha": 1},
    "shira": {"r": 2},
    "bottleneck": {"reduction_factor": 4},
}
_BLOCKS = "its blocks are not among those that bottleneck adapters know"
_NO_BIAS = "it has no bias"
REFUSED = {
    **{("bottleneck", kind): _BLOCKS for kind in ("Phi", "BLOOM", "T5", "BART", "BART classifier", "ViT")},
    **{
        ("bitfit", kind): _NO_BIAS
        for kind in ("Llama", "Qwen3", "Mistral", "Gemma", "Llama classifier", "Llama tagger")
    },
}
PROMPTED = ("Llama", "GPT-2", "Qwen2", "Mistral")  # prompts stand before what a decoder continues
METHOD_NAMES = [
    name
    for name, entry in METHODS.items()
    if issubclass(entry.load(), Adapter) and name not in ("trainable_tokens", "fusion")  # they need more than defaults
]
PAIRS = [
    pytest.param(method, kind, marks=[pytest.mark.slow] * (method != "lora"))
    for method in METHOD_NAMES
    for kind in KINDS
    if kind in PROMPTED or not issubclass(METHODS[method].load(), OnModel)
]


def config_of(method: str, kind: str) -> Any:
    virtual = {"num_virtual_tokens": 5} if issubclass(METHODS[method].load(), OnModel) else {}
    return METHODS[method].load().config_class(task_type=KINDS[kind].task, **SIZES.get(method, {}), **virtual)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_method_with_its_defaults_holds_on_every_kind(method: str, kind: str, tmp_path: Path) -> None:
    model, inputs, task = KINDS[kind].build(), KINDS[kind].inputs(), KINDS[kind].task
    assert task_of(model) == task or kind == "ViT"
    case = next(iter(CASES[method]))
    with torch.no_grad():
        base = answer(model, inputs)
    if reason := REFUSED.get((method, kind)):
        with pytest.raises(TargetError):
            smidgen.get_peft_model(model, config_of(method, kind))
        pytest.skip(reason)
    torch.manual_seed(3)
    model = smidgen.get_peft_model(model, config_of(method, kind)).eval()
    if not excepted((method, case), NOT_IDENTITY_AT_START) or method == "fourierft":
        same(answer(model, inputs), base)
    perturb(model)
    found = answer(model, inputs)
    assert (found - base).abs().max() > 1e-3
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights).sum().backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    without = [
        name for name, p in learning.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    assert learning and not without
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)

    model.save_pretrained(tmp_path)
    fresh = KINDS[kind].build()
    for head in TASK_HEADS.get(task, ()):
        for parameter in getattr(fresh, head, torch.nn.Identity()).parameters():
            torch.nn.init.normal_(parameter)  # as a head is that no file holds
    fresh = smidgen.PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        expected = answer(model, inputs)
        torch.testing.assert_close(answer(fresh, inputs), expected, atol=1e-6, rtol=0)
        if not excepted((method, case), NOT_MERGEABLE):
            same(answer(fresh.merge_and_unload(), inputs), expected)
