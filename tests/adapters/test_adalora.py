"""AdaLoRA's allocation of ranks: against peft's own over several steps, and what a training leaves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import smidgen
from smidgen.adapters.attach import adapters_of, penalties, schedules
from smidgen.errors import TargetError, UsageError
from tests.conftest import logits, perturb, tiny_llama, tokens

OPTIONS: dict[str, Any] = {
    "init_r": 6,
    "target_r": 2,
    "tinit": 2,
    "tfinal": 3,
    "deltaT": 2,
    "total_step": 14,
    "target_modules": ["q_proj", "v_proj", "up_proj"],
    "lora_alpha": 32,
    "task_type": "CAUSAL_LM",
}


def ours(**options: Any) -> Any:
    torch.manual_seed(4)
    return smidgen.get_peft_model(tiny_llama(), smidgen.AdaLoraConfig(**(OPTIONS | options)))


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    optimizer.zero_grad()
    ids = tokens(rows=4, length=10).roll(number, dims=1)
    loss = model(ids, labels=ids).loss
    if isinstance(model, peft.PeftModel):
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
    else:
        loss = loss + sum(penalties(model))
        loss.backward()
        optimizer.step()
        for schedule in schedules(model):
            schedule.after_step(number, optimizer.state)
    return loss.detach()


def trained(model: Any, steps: int = 14) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for number in range(1, steps + 1):
        step(model, optimizer, number)
    return model


def test_the_allocation_is_that_of_peft_over_a_training(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny_llama(), peft.AdaLoraConfig(**OPTIONS))
    model = ours()
    modules = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for path, adapter in adapters_of(model, "default"):
            for name in ("lora_A", "lora_E", "lora_B"):
                getattr(modules[path], name)["default"].copy_(getattr(adapter, name))
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.3) for m in (model, theirs)]
    left = []
    for number in range(1, 15):
        losses = [step(m, optimizer, number) for m, optimizer in zip((model, theirs), optimizers, strict=True)]
        torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)
        left.append(sum(int((adapter.lora_E != 0).sum()) for _, adapter in adapters_of(model, "default")))
        for path, adapter in adapters_of(model, "default"):
            for name in ("lora_A", "lora_E", "lora_B"):
                expected = getattr(modules[path], name)["default"]
                torch.testing.assert_close(getattr(adapter, name), expected, atol=1e-5, rtol=1e-4)
    assert left[1] == 36 and left[3] < 36 and left[10] == left[13] == 12
    pattern = model.peft_config["default"].rank_pattern
    expected = theirs.peft_config["default"].rank_pattern
    assert pattern == {name.replace(".default", ""): kept for name, kept in expected.items()}

    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    shapes = [
        {key: tensor.shape for key, tensor in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1] and len({shape for shape in shapes[0].values()}) > 3
    expected = logits(model.eval(), tokens())
    for who in ("ours", "theirs"):
        torch.testing.assert_close(
            logits(smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / who), tokens()),
            expected,
            atol=1e-5,
            rtol=0,
        )
        again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / who)).eval()
        torch.testing.assert_close(logits(again, tokens()), expected, atol=1e-5, rtol=0)


def test_what_was_saved_is_trained_further_with_its_ranks(tmp_path: Path) -> None:
    trained(ours()).save_pretrained(tmp_path / "first")
    model = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
    pattern = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 12
    trained(model, steps=3).save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["rank_pattern"] == pattern
    again = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    assert torch.equal(logits(again, tokens()), logits(model.eval(), tokens()))


def test_a_file_of_the_middle_answers_as_the_model(tmp_path: Path) -> None:
    model = trained(ours(), steps=7)
    model.save_pretrained(tmp_path)
    again = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, tokens()), logits(model.eval(), tokens()))
    assert again.peft_config["default"].rank_pattern is None


def test_the_penalty_is_that_of_the_paper() -> None:
    model = ours()
    perturb(model)
    factors = [(adapter.lora_A, adapter.lora_B) for _, adapter in adapters_of(model, "default")]  # type: ignore[union-attr]
    expected = sum((x - torch.eye(6)).norm() for a, b in factors for x in (a @ a.T, b.T @ b)) / (2 * len(factors))
    torch.testing.assert_close(sum(penalties(model)), 0.5 * expected)
    model.set_adapter("default", inference_mode=True)
    assert penalties(model) == []


def test_what_cannot_be_is_refused() -> None:
    model = ours(tinit=12)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with pytest.raises(UsageError, match="tinit 12 and tfinal 3 leave none of 14 updates"):
        schedules(model)[0].begin(14, optimizer)
    with pytest.raises(UsageError, match="without DeepSpeed and FSDP"):
        schedules(ours())[0].begin(14, object())
    with pytest.raises(UsageError, match=r"target_r: must be from 1 to init_r 6, got 9\n?"):
        smidgen.AdaLoraConfig(init_r=6, target_r=9)
    with pytest.raises(TargetError, match="cannot stand around a Embedding"):
        ours(target_modules=["embed_tokens"])
    with pytest.raises(TargetError, match="rank_pattern: names other modules"):
        ours(rank_pattern={"model.layers.7.self_attn.q_proj.lora_E": [True]})
