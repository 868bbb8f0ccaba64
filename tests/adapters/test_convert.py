"""Any update of weights as LoRA: exact where the rank suffices, the nearest where it does not, and the rest refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import smidgen
from smidgen.adapters.nearest import kept_lines, nearest
from smidgen.errors import MergeError, UsageError
from tests.conftest import logits, perturb, tiny_llama, tokens
from tests.laws.cases import ALL, CASES, NOT_MERGEABLE, QV, STORED, configuration, grouped, marked, on_base, quick

ENOUGH = 64  # no layer of the cases has a larger smaller side
# Copies, rows and networks.
NO_UPDATES = {"ln_tuning", "bitfit", "trainable_tokens"} | {method for method, _ in NOT_MERGEABLE}


def adapted(method: str, case: str, base: str = "plain") -> Any:
    torch.manual_seed(3)
    model: Any = smidgen.get_peft_model(
        on_base(CASES[method][case][0], base)(), configuration(method, case, base)
    ).eval()
    perturb(model)
    return model


def silent(line: str) -> None:
    """What is told is not looked at."""


@pytest.mark.parametrize("key", map(marked, [*ALL, *filter(quick, STORED)]))
def test_at_full_rank_it_answers_the_same(key: tuple[str, str, str], tmp_path: Path) -> None:
    method, case, base = key
    model = adapted(*key)
    expected, before = logits(model, tokens()), [[*model.state_dict()], [*model.peft_config]]
    if method in NO_UPDATES:
        with pytest.raises(UsageError, match="is no update of weights"):
            smidgen.save_as_lora(tmp_path / "lora", model, ENOUGH)
    elif CASES[method][case][0] is grouped:
        with pytest.raises(UsageError, match="conv: LoRA mixes all channels"):
            smidgen.save_as_lora(tmp_path / "lora", model, ENOUGH)
    else:
        smidgen.save_as_lora(tmp_path / "lora", model, ENOUGH, say=silent)
        lora = smidgen.PeftModel.from_pretrained(on_base(CASES[method][case][0], base)(), tmp_path / "lora")
        assert isinstance(lora.peft_config["default"], smidgen.LoraConfig)
        torch.testing.assert_close(logits(lora, tokens()), expected, atol=1e-4, rtol=1e-4)
    assert [[*model.state_dict()], [*model.peft_config]] == before
    assert torch.equal(logits(model, tokens()), expected)


OWN_RANK = ["default", "all-linear", "rslora", "embedding", "embedding tied", "Conv1D", "bias all"]


@pytest.mark.parametrize("case", OWN_RANK)
def test_lora_at_its_own_rank_answers_the_same(case: str, tmp_path: Path) -> None:
    model = adapted("lora", case)
    expected, told = logits(model, tokens()), []
    smidgen.save_as_lora(tmp_path, model, model.peft_config["default"].r, say=told.append)
    for lora in (
        smidgen.PeftModel.from_pretrained(CASES["lora"][case][0](), tmp_path),
        peft.PeftModel.from_pretrained(CASES["lora"][case][0](), str(tmp_path)).eval(),
    ):
        torch.testing.assert_close(logits(lora, tokens()), expected, atol=1e-5, rtol=1e-5)
    exact = re.compile(r"\w+ x\d+: rank \d keeps 100.00% of the update's norm, error \S+e-0[678] .*")
    assert told and all(map(exact.fullmatch, told))


@pytest.mark.parametrize("method", ["loha", "lokr", "vera"])
def test_equals_pefts_conversion(method: str, tmp_path: Path) -> None:
    model = adapted(method, "all-linear")
    model.save_pretrained(tmp_path)
    _, expected = peft.convert_to_lora(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)), rank=3)
    config, tensors = smidgen.convert_to_lora(model, 3, say=silent)
    assert (config.r, config.lora_alpha) == (3, 3) and tensors.keys() == expected.keys()
    for key in tensors:
        if key.endswith("lora_A.weight"):
            other = key.replace("lora_A", "lora_B")
            ours, theirs = (found[other] @ found[key] for found in (tensors, expected))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_is_told_is_what_is_lost() -> None:
    known = torch.diag(torch.tensor([4.0, 3.0, 0.0, 12.0]))
    found = {"a.q": nearest(known, 2), "a.v": nearest(known[:2], 2), "b.q": nearest(torch.zeros(3, 5), 2)}
    assert found["a.q"].norm == pytest.approx(13) and found["a.q"].error == pytest.approx(3)
    torch.testing.assert_close(found["a.q"].b @ found["a.q"].a, torch.diag(torch.tensor([4.0, 0.0, 0.0, 12.0])))
    share = 3 / math.hypot(13, 5)
    assert kept_lines(found, 2) == [
        f"q x2: rank 2 keeps {math.sqrt(1 - (3 / 13) ** 2):.2%} of the update's norm, error 0.23 (largest 0.23)",
        "v x1: rank 2 keeps 100.00% of the update's norm, error 0 (largest 0)",
        f"all x3: rank 2 keeps {math.sqrt(1 - share**2):.2%} of the update's norm, error {share:.2g} (largest 0.23)",
    ]


def test_wrong_requests_change_nothing(tmp_path: Path) -> None:
    model = adapted("lora", "default")
    (tmp_path / "there").write_text("", encoding="utf-8")
    for ask, message in (
        (lambda: smidgen.convert_to_lora(model, 0), "rank: must be a whole number from 1"),
        (lambda: smidgen.convert_to_lora(model, 4, "defalt"), "no 'defalt'; did you mean 'default'"),
        (lambda: smidgen.convert_to_lora(tiny_llama(), 4), "without adapters has none to convert"),
        (lambda: smidgen.save_as_lora(tmp_path, model, 4), "is not empty"),
    ):
        with pytest.raises(UsageError, match=message):
            ask()
    model.model.layers[1].self_attn.v_proj.adapters["default"].lora_B.weight.data[0] = float("nan")
    with pytest.raises(MergeError, match=r"layers\.1\.self_attn\.v_proj: the update has values that are not finite"):
        smidgen.convert_to_lora(model, 4, say=silent)
    assert list(model.peft_config) == ["default"]


def test_merged_adapters_are_refused() -> None:
    model = adapted("lora", "default")
    model.merge_adapter()
    with pytest.raises(UsageError, match="merged into the weights; call unmerge_adapter"):
        smidgen.convert_to_lora(model, 4)


def test_the_base_is_known_to_the_file(tmp_path: Path) -> None:
    smidgen.save_as_lora(tmp_path, adapted("loha", "all-linear"), 4, say=silent)
    other = tiny_llama()
    with torch.no_grad():
        other.get_parameter("model.norm.weight").add_(1)
    with pytest.raises(UsageError, match="trained on base"):
        smidgen.PeftModel.from_pretrained(other, tmp_path)
    assert QV[0] in smidgen.PeftConfig.from_pretrained(tmp_path).target_modules  # pyright: ignore[reportAttributeAccessIssue]
