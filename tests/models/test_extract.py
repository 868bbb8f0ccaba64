"""LoRA from the difference of two models: what was merged comes back, what else differs is told."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import smidgen
from smidgen.adapters.attach import adapters_of, fold_in_float32
from smidgen.errors import ModelError, UsageError
from smidgen.models import extract
from smidgen.models.extract import extract_lora
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama, tokens
from tests.laws.cases import tied

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (tiny_llama, {"target_modules": "all-linear"}),
    "some layers": (tied, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "v_proj"]}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
}
RANK = 4


def save(folder: Path, case: str = "llama", shard: str = "1GB") -> tuple[Path, Path, Any]:
    """Folders of a base and of the base with LoRA merged into it, and the adapted model itself."""
    build, options = CASES[case]
    build().save_pretrained(folder / "base", max_shard_size=shard)  # pyright: ignore[reportCallIssue]
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        model: Any = smidgen.get_peft_model(build(), smidgen.LoraConfig(r=RANK, **options)).eval()
        perturb(model)
        models.append(model)
    models[1].merge_and_unload().save_pretrained(folder / "tuned")
    return folder / "base", folder / "tuned", models[0]


@pytest.mark.parametrize("case", CASES)
def test_what_was_merged_comes_back(case: str, tmp_path: Path) -> None:
    base, tuned, model = save(tmp_path, case, shard="20KB")
    assert case != "llama" or (base / "model.safetensors.index.json").exists()
    told: list[str] = []
    found = extract_lora(base, tuned, tmp_path / "lora", RANK, told.append)
    assert found.keys() == dict(adapters_of(model, "default")).keys()
    again = smidgen.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    for path in found:
        changes = []
        for here in (model, again):
            module = here.get_submodule(path)
            both = (fold_in_float32(module, names)["weight"].double() for names in (["default"], []))
            changes.append(next(both) - next(both))
        assert (changes[0] - changes[1]).norm() <= 1e-4 * changes[0].norm()
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned), tokens())
    assert (expected - logits(CASES[case][0](), tokens())).abs().max() > 1e-2
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "lora")).eval()
    for here in (again, theirs):
        torch.testing.assert_close(logits(here, tokens()), expected, atol=1e-4, rtol=1e-4)
    assert not any("not extracted" in line for line in told)
    assert all("rank 4 keeps 100.00% of the update's norm" in line for line in told)


def test_what_else_differs_is_told(tmp_path: Path) -> None:
    base, tuned, _ = save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        model.model.norm.weight[3] += 0.25
        model.model.embed_tokens.weight[5] -= 0.5
    model.save_pretrained(tuned)
    told: list[str] = []
    extract_lora(base, tuned, tmp_path / "lora", RANK, told.append)
    first = "not extracted: 2 tensors outside linear layers differ too, model.embed_tokens.weight most, by 0.5"
    assert told[0] == first and told[-1].startswith("all x14: rank 4 keeps")


def test_the_lines_tell_each_kind_of_layer(tmp_path: Path) -> None:
    base, tuned, _ = save(tmp_path)
    told: list[str] = []
    found = extract_lora(base, tuned, tmp_path / "lora", 1, told.append)
    q = [one for path, one in found.items() if path.endswith("q_proj")]
    error = (sum(one.error**2 for one in q) / sum(one.norm**2 for one in q)) ** 0.5
    assert 0.1 < error < 1
    line = f"q_proj x2: rank 1 keeps {(1 - error**2) ** 0.5:.2%} of the update's norm, error {error:.2g} "
    assert told[0].startswith(line)


def test_16_bit_files_are_read(tmp_path: Path) -> None:
    base, tuned, _ = save(tmp_path)
    for folder in (base, tuned):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    extract_lora(base, tuned, tmp_path / "lora", 32, lambda line: None)
    lora = smidgen.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), tmp_path / "lora")
    expected = logits(AutoModelForCausalLM.from_pretrained(tuned).float(), tokens())
    torch.testing.assert_close(logits(lora, tokens()), expected, atol=1e-4, rtol=1e-4)


def test_one_layer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, _ = save(tmp_path)
    alive: list[Any] = []
    read, cut, most = extract.Stored.read, extract.nearest, []

    def reading(self: Any, name: str) -> Any:
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    def cutting(*args: Any) -> Any:
        most.append(sum(reference() is not None for reference in alive))
        return cut(*args)

    monkeypatch.setattr(extract.Stored, "read", reading)
    monkeypatch.setattr(extract, "nearest", cutting)
    extract_lora(base, tuned, tmp_path / "lora", RANK, lambda line: None)
    assert len(most) == 14 and max(most) <= 2


def test_another_base_is_refused(tmp_path: Path) -> None:
    base, tuned, _ = save(tmp_path)
    extract_lora(base, tuned, tmp_path / "lora", RANK, lambda line: None)
    with pytest.raises(UsageError, match="trained on base"):
        smidgen.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tuned), tmp_path / "lora")


def test_wrong_requests_write_nothing(tmp_path: Path) -> None:
    base, tuned, _ = save(tmp_path)
    larger = tmp_path / "larger"
    tiny_llama(intermediate_size=96).save_pretrained(larger)  # pyright: ignore[reportCallIssue]
    broken = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(tuned)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(broken)
    out = tmp_path / "lora"
    for asked, error, message in (
        ((base, base, out, 4), UsageError, "no linear layer differs"),
        ((base, larger, out, 4), ModelError, r"up_proj\.weight: \(64, 32\) in .*base, \(96, 32\) in .*larger"),
        ((base, broken, out, 4), ModelError, r"layers\.0\.mlp\.up_proj\.weight: holds values that are not finite"),
        ((base, tuned, out, 0), UsageError, "rank: must be a whole number"),
        ((base, tuned, base, 4), UsageError, "is not empty"),
        ((base, tmp_path, out, 4), ModelError, "no config.json"),
    ):
        with pytest.raises(error, match=message):
            extract_lora(*asked, lambda line: None)  # pyright: ignore[reportArgumentType]
    assert not out.exists()
