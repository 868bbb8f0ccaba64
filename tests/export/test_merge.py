"""Merging for good: the merged folder answers as the adapted model, or nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.errors import MergeError, UsageError
from smidgen.export.merge import merge_to_folder
from tests.conftest import logits, perturb
from tests.training.conftest import save_tiny_model

QUESTION = [[1, 17, 13, 14, 16, 15, 14, 10]]


@pytest.fixture
def adapted(tmp_path: Path) -> tuple[Any, Any]:
    base = save_tiny_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = smidgen.get_peft_model(model, smidgen.LoraConfig(r=4, target_modules="all-linear")).eval()
    perturb(model)
    return model, AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_merged_folder_answers_as_the_adapted_model(adapted: Any, tmp_path: Path, dtype: Any, atol: float) -> None:
    model, tokenizer = adapted
    ids = torch.tensor(QUESTION)
    expected, said = logits(model, ids), []
    parity = merge_to_folder(model, tokenizer, tmp_path / "merged", dtype, say=said.append)
    assert parity.passed and said == [str(parity)]
    assert "parity on 8 prompts: max |dlogit|" in said[0] and "same greedy tokens 8/8" in said[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert loaded.dtype == dtype and loaded.generation_config.eos_token_id == [2]
    torch.testing.assert_close(logits(loaded.float(), ids), expected, atol=atol, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("sky").input_ids == tokenizer("sky").input_ids


def test_a_wrong_scale_is_refused_and_nothing_is_written(
    adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = adapted
    merge = type(model).merge_and_unload

    def wrong(self: Any) -> Any:
        for _, adapter in adapters_of(self, "default"):
            adapter.scaling *= 8
        return merge(self)

    monkeypatch.setattr(type(model), "merge_and_unload", wrong)
    with pytest.raises(MergeError, match="merge refused: the merged model does not answer as the adapted one"):
        merge_to_folder(model, tokenizer, tmp_path / "merged", torch.float32, say=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_value_that_is_not_finite_is_named(adapted: Any, tmp_path: Path) -> None:
    model, tokenizer = adapted
    model.model.layers[1].mlp.up_proj.adapters["default"].lora_B.weight.data[0] = float("nan")
    with pytest.raises(MergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*not finite"):
        merge_to_folder(model, tokenizer, tmp_path / "merged", torch.float32, say=lambda line: None)
    assert not (tmp_path / "merged").exists()


def test_a_folder_with_something_in_it_is_left_alone(adapted: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not empty"):
        merge_to_folder(*adapted, tmp_path / "base", torch.float32)
