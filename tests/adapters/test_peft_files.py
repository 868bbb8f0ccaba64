"""Adapter files against peft itself: what one writes the other loads, with equal keys, shapes, fields and logits."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import smidgen
from tests.conftest import logits, perturb, tokens
from tests.laws.cases import LORA_CASES, NOT_EQUAL_TO_PEFT


@pytest.fixture(params=[case for case in LORA_CASES if case not in NOT_EQUAL_TO_PEFT], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    return LORA_CASES[request.param]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_what_peft_writes_loads_here(case: Any, tmp_path: Path) -> None:
    build, options = case
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options)).eval()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = smidgen.PeftModel.from_pretrained(build(), tmp_path)
    expected, base = logits(theirs, tokens()), logits(build(), tokens())
    assert (expected - base).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-5, rtol=0)


def test_what_we_write_loads_in_peft(case: Any, tmp_path: Path) -> None:
    build, options = case
    ours = smidgen.get_peft_model(build(), smidgen.LoraConfig(**options)).eval()
    perturb(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    expected, base = logits(ours, tokens()), logits(build(), tokens())
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs, tokens()), expected, atol=1e-5, rtol=0)


def test_keys_shapes_and_fields_equal_pefts(case: Any, tmp_path: Path) -> None:
    build, options = case
    peft.get_peft_model(build(), peft.LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    smidgen.get_peft_model(build(), smidgen.LoraConfig(**options)).save_pretrained(tmp_path / "ours")
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    assert shapes[0] == shapes[1]
    ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert ours.keys() <= theirs.keys()


def test_number_of_trained_parameters_equals_pefts(case: Any) -> None:
    build, options = case
    if options.get("target_modules") == ["embed_tokens"] and options.get("ensure_weight_tying"):
        pytest.skip("peft counts the mirrored factors twice")
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options))
    ours = smidgen.get_peft_model(build(), smidgen.LoraConfig(**options))
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
