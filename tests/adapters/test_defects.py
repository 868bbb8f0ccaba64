"""What goes wrong in peft 0.21 and must not here: one test each, by what a user would see.

Some have their test elsewhere: rows with adapters of their own (the laws), bitsandbytes' layers merged after a call
(models/test_quantize), prompts that are trained further (models/test_prompts); a padded kernel under OFT, a head with a
bias under trained tokens, RandLoRA's bases in the file once (test_methods).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.config import TargetConfig
from smidgen.errors import AdapterFileError, UsageError
from smidgen.registry import METHODS
from tests.conftest import logits, perturb, tiny_llama, tokens, toy
from tests.laws.cases import CASES, NOT_MERGEABLE, configuration, excepted, on_base

QV = ["q_proj", "v_proj"]
FIRST = {method: next(iter(cases)) for method, cases in CASES.items()}
MERGEABLE = [method for method, case in FIRST.items() if not excepted((method, case), NOT_MERGEABLE)]


def adapted(method: str, base: str = "plain") -> Any:
    torch.manual_seed(3)
    build = CASES[method][FIRST[method]][0]
    return smidgen.get_peft_model(on_base(build, base)(), configuration(method, FIRST[method])).eval()


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["hra", "oft", "boft", "miss", "vera"])
def test_methods_read_the_weight_and_never_its_codes(method: str, base: str) -> None:
    """peft's HRA and DEFT compute with int8 codes as if they were weights."""
    model, plain = adapted(method, base), on_base(CASES[method][FIRST[method]][0], base)()
    torch.testing.assert_close(logits(model, tokens()), logits(plain, tokens()), atol=1e-5, rtol=1e-5)
    perturb(model, scale=0.02)
    expected = logits(model, tokens())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("called", [False, True])
def test_a_call_before_merging_changes_nothing(called: bool) -> None:
    """peft merges a 4-bit layer wrongly after an evaluation, which packs its weight anew."""
    model = adapted("lora", "nf4")
    perturb(model)
    if called:
        with torch.no_grad():
            logits(model, tokens())
    weights = {
        path: model.get_submodule(path).weight.clone()
        for path in (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    }
    model.merge_adapter()
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        a, b = layer.adapters["default"].factors()
        torch.testing.assert_close(layer.weight, weight + layer.adapters["default"].scaling * (b @ a))


def test_replicated_layers_are_refused(tmp_path: Path) -> None:
    """peft merges several updates into the one weight that replicated layers share."""
    adapted("lora").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 2], [1, 2]]}))
    with pytest.raises(AdapterFileError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\] is not supported"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize("method", MERGEABLE)
def test_two_adapters_of_one_method_answer_as_their_merged_weights(method: str) -> None:
    """peft's C3A gives the second active adapter what the first one answered."""
    model = adapted(method)
    model.add_adapter("second", configuration(method, FIRST[method]))
    model.set_adapter(["default", "second"])
    perturb(model, seed=7)
    expected = logits(model, tokens())
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), expected, atol=5e-5, rtol=1e-5)


def test_adapters_called_by_numbers_keep_their_keys_and_hold_no_base(tmp_path: Path) -> None:
    """peft's X-LoRA calls its adapters "0" and "1", cuts these out of `layers.0`, and saves the base with them."""
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules=QV), adapter_name="0")
    model.add_adapter("1", smidgen.LoraConfig(target_modules=QV))
    model.set_adapter(["0", "1"])
    perturb(model)
    model.save_pretrained(tmp_path)
    expected = {
        f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight"
        for layer in (0, 1)
        for name in QV
        for side in "AB"
    }
    again = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "0", adapter_name="0")
    again.load_adapter(tmp_path / "1", "1")
    again.set_adapter(["0", "1"])
    assert torch.equal(logits(again.eval(), tokens()), logits(model.eval(), tokens()))
    assert all(load_file(tmp_path / n / "adapter_model.safetensors").keys() == expected for n in ("0", "1"))


def test_a_randomised_start_is_found_again_under_any_seed(tmp_path: Path) -> None:
    """peft draws `pissa_niter_N` anew at each load, without a seed."""
    config = smidgen.LoraConfig(target_modules=QV, init_lora_weights="pissa_niter_4")
    model = smidgen.get_peft_model(tiny_llama(), config).eval()
    perturb(model)
    model.save_pretrained(tmp_path)
    for seed in (1, 2):
        base = tiny_llama()
        torch.manual_seed(seed)
        again = smidgen.PeftModel.from_pretrained(base, tmp_path)
        assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("method", CASES)
def test_a_row_answers_the_same_whatever_its_batch_mates(method: str) -> None:
    """peft's Lily routes by a mean over all tokens of the batch."""
    model = adapted(method)
    perturb(model)
    ids = tokens(rows=3)
    other = torch.cat([ids[:1], ids[1:].flip(-1)])
    torch.testing.assert_close(logits(model, ids)[:1], logits(model, other)[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(model, ids)[:1], logits(model, ids[:1]), atol=1e-5, rtol=1e-5)


TARGETED = [method for method in CASES if issubclass(METHODS[method].load().config_class, TargetConfig)]


@pytest.mark.parametrize("target", ["embed", "conv1", "conv3", "norm"])
@pytest.mark.parametrize("method", TARGETED)
def test_a_target_is_adapted_or_refused(method: str, target: str) -> None:
    """peft's OSF adapts nothing of a layer that is not linear, and says nothing."""
    model = toy()
    options = copy.deepcopy(CASES[method][FIRST[method]][1])
    options = {name: value for name, value in options.items() if name not in ("target_modules", "task_type")}
    try:
        config = METHODS[method].load().config_class(**options | {"target_modules": [target]})
        adapted_model = smidgen.get_peft_model(model, config)
    except UsageError as error:
        assert target in str(error) or type(toy()).__name__ in str(error)
        assert type(model) is type(toy()) and not any("adapters" in name for name, _ in model.named_modules())
    else:
        names = [name for name, parameter in adapted_model.named_parameters() if parameter.requires_grad]
        assert names and all(name.startswith(f"{target}.") for name in names)
