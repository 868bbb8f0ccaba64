"""The learning rate over a run, who is decayed, who learns faster, and the optimizers that ours equal."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from smidgen.adapters.methods.lora import LoraConfig
from smidgen.errors import UsageError
from smidgen.models.peft_model import get_peft_model
from smidgen.training.optimizers import check_optimizer, learning_rate, make_optimizer, updates_of
from tests.conftest import tiny_llama
from tests.training.conftest import TRAIN, make_loop, make_rows, tiny_lora

BASE = replace(TRAIN, learning_rate=1.0, warmup_ratio=0.2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, *(1 - k / 8 for k in range(8))]),
        ("cosine", [1 / 3, 2 / 3, *(0.5 + 0.5 * math.cos(math.pi * k / 8) for k in range(8))]),
    ],
)
def test_learning_rate(name, expected):
    train = replace(BASE, lr_scheduler_type=name)
    assert [learning_rate(train, step, 10) for step in range(10)] == pytest.approx(expected)


def test_vectors_are_not_decayed(tmp_path):
    model = tiny_llama()
    optimizer = make_optimizer(model, replace(BASE, weight_decay=0.1), tmp_path)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decay == {name: 0.1 if parameter.ndim > 1 else 0.0 for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("train", "updates"), [({"max_steps": 7}, 7), ({"epochs": 2.5, "max_steps": None}, 8)])
def test_updates_of_a_run(train, updates):
    assert updates_of(replace(TRAIN, **train), rows=10) == updates


# ---- LoRA+ ----


def test_lora_plus_has_the_rates_of_peft(tmp_path):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    settings: Any = {"r": 4, "use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}
    reference = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings))
    rates = create_loraplus_optimizer(reference, torch.optim.AdamW, lr=0.5, loraplus_lr_ratio=16.0)
    names = {id(parameter): name for name, parameter in reference.named_parameters()}
    expected = {
        names[id(p)].replace("base_model.model.", "").replace(".default", "").removesuffix(".weight"): group["lr"]
        for group in rates.param_groups
        for p in group["params"]
    }
    model: Any = get_peft_model(tiny_llama(), LoraConfig(**settings))
    optimizer = make_optimizer(model, replace(BASE, learning_rate=0.5, loraplus_lr_ratio=16.0), tmp_path)
    found = {
        name.replace("adapters.default.", "").removesuffix(".weight"): 0.5 * group["scale"]
        for group in optimizer.param_groups
        for name in group["names"]
    }
    assert found == pytest.approx(expected)
    assert set(expected.values()) == {0.5, 8.0, 1e-6}


def test_the_schedule_moves_all_rates(tmp_path):
    train = {"loraplus_lr_ratio": 4.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.0, "max_steps": 2}
    loop = make_loop(tiny_lora(), make_rows([6, 8, 5, 7]), tmp_path, **train)
    loop.fit()
    assert sorted({group["lr"] for group in loop.optimizer.param_groups}) == pytest.approx([0.005, 0.02])


def test_lora_plus_needs_a_b_matrix(tmp_path):
    with pytest.raises(UsageError, match=r"train.loraplus_lr_ratio: no B matrix"):
        make_optimizer(tiny_llama(), replace(BASE, loraplus_lr_ratio=2.0), tmp_path)


# ---- references ----


def test_adafactor_is_that_of_transformers_as_its_trainer_sets_it(tmp_path):
    from transformers.optimization import Adafactor

    model, twin = tiny_llama(), tiny_llama()
    ours = make_optimizer(model, replace(BASE, optim="adafactor", learning_rate=1e-2), tmp_path)
    theirs = Adafactor(twin.parameters(), lr=1e-2, scale_parameter=False, relative_step=False)
    torch.manual_seed(6)
    for _ in range(5):
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-6, msg=name)


# ---- devices ----


def test_a_device_that_lacks_what_is_needed_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install bitsandbytes, or take 'adamw'"):
        check_optimizer("adamw_8bit", torch.device("cuda"))
    with pytest.raises(UsageError, match="not of mps; take 'lion_8bit'"):
        check_optimizer("paged_lion_8bit", torch.device("mps"))
    check_optimizer("paged_adamw_8bit", torch.device("cpu"))
    check_optimizer("lion", torch.device("cuda"))
