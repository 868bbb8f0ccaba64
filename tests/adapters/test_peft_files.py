"""Adapter files against peft itself: what one writes the other loads, with equal keys, shapes, fields and logits."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.registry import METHODS
from tests.conftest import logits, perturb, tokens
from tests.laws.cases import CASES, MORE_KEYS_THAN_PEFT, NOT_EQUAL_TO_PEFT, configuration, excepted, quick

SAME = [
    pytest.param((method, name), id=f"{method}-{name}", marks=[pytest.mark.slow] * (not quick((method, name, "plain"))))
    for method, cases in CASES.items()
    for name in cases
    if not excepted((method, name), NOT_EQUAL_TO_PEFT)
]


class Case(NamedTuple):
    """A case: its key, the bare model, and the options of the method's configuration."""

    key: tuple[str, str]
    build: Callable[[], nn.Module]
    options: dict[str, Any]

    @property
    def config_class(self) -> Any:
        return METHODS[self.key[0]].load().config_class

    def ours(self) -> Any:
        """The model with the method's adapter."""
        return smidgen.get_peft_model(self.build(), configuration(*self.key)).eval()

    def theirs(self) -> Any:
        """The same of peft."""
        config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[self.config_class.peft_type]
        return peft.get_peft_model(self.build(), config_class(**copy.deepcopy(self.options))).eval()


@pytest.fixture(params=SAME)
def case(request: pytest.FixtureRequest) -> Case:
    method, name = request.param
    case = Case(request.param, *CASES[method][name])
    assert case.options.keys() <= {field.name for field in dataclasses.fields(case.config_class)}
    return case


def tail(model: nn.Module, case: Case) -> Tensor:
    """The logits of the caller's tokens: peft's prompts answer for their virtual tokens too."""
    answer, virtual = logits(model, tokens()), case.options.get("num_virtual_tokens", 0)
    return answer[:, virtual:] if answer.shape[1] == tokens().shape[1] + virtual else answer


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_what_peft_writes_loads_here(case: Case, tmp_path: Path) -> None:
    theirs = case.theirs()
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = smidgen.PeftModel.from_pretrained(case.build(), tmp_path)
    expected, base = tail(theirs, case), logits(case.build(), tokens())
    assert (expected - base).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(logits(ours, tokens()), expected, atol=1e-5, rtol=0)


def test_what_we_write_loads_in_peft(case: Case, tmp_path: Path) -> None:
    ours = case.ours()
    perturb(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(case.build(), str(tmp_path)).eval()
    expected, base = logits(ours, tokens()), logits(case.build(), tokens())
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(tail(theirs, case), expected, atol=1e-5, rtol=0)


def test_keys_shapes_and_fields_equal_pefts(case: Case, tmp_path: Path) -> None:
    case.theirs().save_pretrained(tmp_path / "theirs")
    model = case.ours()
    model.save_pretrained(tmp_path / "ours")
    shapes = [
        {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / who / "adapter_model.safetensors").items()}
        for who in ("ours", "theirs")
    ]
    repeated = {key for path, adapter in adapters_of(model, "default") for key in adapter.repeated(path)}
    written = {key: shape for key, shape in shapes[1].items() if key not in repeated}
    if excepted(case.key, MORE_KEYS_THAN_PEFT):
        assert shapes[0].items() > written.items()
    else:
        assert shapes[0] == written
    ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert ours.keys() - case.config_class.beyond_format <= theirs.keys()
    assert {name for name in ours if name in case.options and ours[name] != plain(case.options[name])} == set()
    sizes = {name for name in ours if name.startswith("num_") or name in ("token_dim", "encoder_hidden_size")}
    assert {name: ours[name] for name in sizes} == {name: theirs[name] for name in sizes}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_number_of_trained_parameters_equals_pefts(case: Case) -> None:
    if case.options.get("target_modules") == ["embed_tokens"] and case.options.get("ensure_weight_tying"):
        pytest.skip("peft counts the mirrored factors twice")
    assert case.ours().get_nb_trainable_parameters()[0] == case.theirs().get_nb_trainable_parameters()[0]
