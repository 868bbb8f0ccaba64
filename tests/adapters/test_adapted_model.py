"""The names people type, on the model that `get_peft_model` answers."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import smidgen
from smidgen.errors import MergeError, UsageError
from smidgen.models.peft_model import AdaptedModel
from tests.conftest import logits, perturb, tiny_llama, tokens

QV = ["q_proj", "v_proj"]


def adapted(**options: Any) -> Any:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(**({"target_modules": QV} | options)))
    perturb(model)
    return model.eval()


def test_the_same_object_still_of_its_class() -> None:
    base = tiny_llama()
    model = smidgen.get_peft_model(base, smidgen.LoraConfig())
    assert model is base and isinstance(model, LlamaForCausalLM) and isinstance(model, smidgen.PeftModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not isinstance(tiny_llama(), smidgen.PeftModel)
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_line_of_trainable_parameters_equals_pefts(capsys: pytest.CaptureFixture[str]) -> None:
    peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=QV)).print_trainable_parameters()
    theirs = capsys.readouterr().out
    smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules=QV)).print_trainable_parameters()
    assert capsys.readouterr().out == theirs


METHODS = (
    "add_adapter load_adapter set_adapter delete_adapter disable_adapter save_pretrained get_base_model "
    "merge_and_unload merge_adapter unmerge_adapter unload print_trainable_parameters"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS.split())
def test_signatures_are_pefts(name: str) -> None:
    """transformers' models have methods of some of these names with other signatures: here peft's are met."""
    owner = peft.PeftModel if hasattr(peft.PeftModel, name) else peft.tuners.tuners_utils.BaseTuner
    theirs = list(inspect.signature(getattr(owner, name)).parameters.values())
    ours = inspect.signature(getattr(AdaptedModel, name)).parameters
    positional = [p.name for p in theirs if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    assert accepts_any or {p.name for p in theirs if p.kind is not p.VAR_KEYWORD} <= ours.keys()


def test_several_adapters_switch_and_go() -> None:
    model = adapted()
    first = logits(model, tokens())
    model.add_adapter("second", smidgen.LoraConfig(target_modules=["o_proj"], r=2))
    assert torch.equal(logits(model, tokens()), first)
    model.set_adapter("second")
    assert model.active_adapters == ["second"] and model.active_adapter == "second"
    assert set(model.peft_config) == {"default", "second"}
    assert all("second" in name for name, p in model.named_parameters() if p.requires_grad)
    perturb(model)
    assert not torch.equal(logits(model, tokens()), first)
    model.set_adapter("default")
    assert torch.equal(logits(model, tokens()), first)
    model.delete_adapter("default")
    assert model.active_adapters == [] and torch.equal(logits(model, tokens()), logits(tiny_llama(), tokens()))
    with pytest.raises(UsageError, match="no 'defualt'; did you mean"):
        adapted().set_adapter("defualt")


def test_merged_adapters_are_guarded() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(UsageError, match="unmerge"):
        model.delete_adapter("default")
    with pytest.raises(UsageError, match="unmerge"):
        model.add_adapter("second", smidgen.LoraConfig(target_modules=QV))
    with pytest.raises(UsageError, match="unmerge_adapter"):
        model(tokens(), adapter_names=["default"] * 3)


def test_merging_a_value_that_is_not_finite_names_it_and_changes_nothing() -> None:
    model = adapted()
    broken = model.model.layers[1].self_attn.v_proj
    broken.adapters["default"].lora_B.weight.data[0, 0] = float("inf")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MergeError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight.*not finite"):
        model.merge_and_unload()
    assert isinstance(model, smidgen.PeftModel)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_update_with_a_bias_does_not_merge_into_a_layer_without_one() -> None:
    with pytest.raises(MergeError, match="has a bias and the layer has none"):
        adapted(lora_bias=True).merge_adapter()


def test_16_bit_weights_are_merged_in_fp32_and_cast_once() -> None:
    model = smidgen.get_peft_model(tiny_llama().bfloat16(), smidgen.LoraConfig(target_modules=QV, r=4))
    perturb(model)
    layer = model.model.layers[0].self_attn.q_proj
    adapter, weight = layer.adapters["default"], layer.weight.double()
    exact = weight + adapter.scaling * adapter.lora_B.weight.double() @ adapter.lora_A.weight.double()
    model.merge_adapter()
    assert torch.equal(layer.weight, exact.float().bfloat16())


def test_rows_refuse_what_would_be_wrong() -> None:
    model = adapted()
    with pytest.raises(UsageError, match="no 'other'"):
        model(tokens(), adapter_names=["other"] * 3)
    with pytest.raises(UsageError, match="not called with the 2 rows"):
        model(tokens(), adapter_names=["default"] * 2)
    with pytest.raises(UsageError, match="beam"):
        model.generate(tokens(), adapter_names=["default"] * 3, num_beams=2)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="gradient checkpointing"):
        model(tokens(), adapter_names=["default"] * 3)


def test_rows_in_generation_equal_one_at_a_time() -> None:
    model = adapted(r=4)
    model.add_adapter("second", smidgen.LoraConfig(target_modules=["down_proj"]))
    model.set_adapter("second")
    perturb(model, seed=8, scale=0.3)
    names, options = ["default", "__base__", "second"], {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(tokens(), adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = model.generate(tokens()[row : row + 1], adapter_names=[name], **options)
        length = alone.shape[1]
        assert torch.equal(together[row, :length], alone[0])


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
from tests.conftest import tokens
from safetensors.torch import load_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
print((model(tokens()).logits - load_file(sys.argv[1] + "/expected.st")["logits"]).abs().max().item())
"""


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": QV, "modules_to_save": ["embed_tokens"]},
        {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": False},
        {"target_modules": ["lm_head"], "ensure_weight_tying": False},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": QV, "trainable_token_indices": [4, 9]},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_tied_embeddings_merged_saved_and_loaded_in_a_new_process(options: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = smidgen.get_peft_model(tiny_llama(tied=True), smidgen.LoraConfig(**options)).eval()
    perturb(model)
    expected = logits(model, tokens())
    apart = options.get("ensure_weight_tying") is False
    if apart:
        with pytest.warns(UserWarning, match="untied by merging: the saved model is 0.0 MB larger"):
            merged = model.merge_and_unload()
    else:
        merged = model.merge_and_unload()
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is not apart
    merged.save_pretrained(tmp_path)
    save_file({"logits": expected.detach()}, tmp_path / "expected.st")
    script = [sys.executable, "-c", RELOAD, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 1e-5
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is not apart


def test_auto_classes_load_the_base_that_the_file_names(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = smidgen.LoraConfig(target_modules=QV, task_type=smidgen.TaskType.CAUSAL_LM)
    model = smidgen.get_peft_model(base, config).eval()
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    for auto in (smidgen.AutoPeftModelForCausalLM, smidgen.AutoPeftModel):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    config = smidgen.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert isinstance(config, smidgen.LoraConfig) and config.base_model_name_or_path == str(tmp_path / "base")


def test_a_plain_torch_module_is_adapted_too() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = model(torch.ones(1, 4))
    model = smidgen.get_peft_model(model, smidgen.LoraConfig(target_modules=["0", "2"], r=2))
    assert torch.equal(model(torch.ones(1, 4)), before)
    perturb(model)
    expected = model(torch.ones(1, 4))
    torch.testing.assert_close(model.merge_and_unload()(torch.ones(1, 4)), expected)
