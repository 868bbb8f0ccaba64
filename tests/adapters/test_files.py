"""Adapter files: strict both ways, never a pickle, never a silent other base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smidgen
from smidgen.errors import AdapterFileError, UsageError
from tests.conftest import logits, perturb, tiny_llama, tokens

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules=["q_proj"], r=4))
    perturb(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, model: Any = None, **options: Any) -> str:
    model = tiny_llama() if model is None else model
    kind = type(model)
    with pytest.raises(AdapterFileError) as caught:
        smidgen.PeftModel.from_pretrained(model, folder, **options)
    assert type(model) is kind and not any(".adapters." in name for name, _ in model.named_parameters())
    return str(caught.value)


def test_a_renamed_key_is_named_with_its_likely_cause(folder: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
        tensors[key.replace("q_proj", "wq")] = tensors.pop(key)

    edit(folder, rename)
    message = refused(folder)
    assert "the adapter does not fit the model: 1 missing, 1 unexpected" in message
    assert "missing: base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in message
    assert "unexpected: base_model.model.model.layers.1.self_attn.wq.lora_A.weight" in message
    assert "'wq' is called 'q_proj' here" in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(next(iter(t))), "1 missing, 0 unexpected"),
        (lambda t: t.update(extra=torch.zeros(1)), "0 missing, 1 unexpected"),
        (lambda t: t.update({k: torch.zeros(2, 2) for k in [next(iter(t))]}), "has shape [2, 2], the model needs"),
        (lambda t: [t.update({k.removeprefix("base_model.model."): t.pop(k)}) for k in list(t)], "another prefix"),
        (
            lambda t: [t.update({k.replace("lora_A.", "lora_A.default."): t.pop(k)}) for k in list(t)],
            "the adapter's name",
        ),
    ],
)
def test_files_that_do_not_fit(folder: Path, change: Any, said: str) -> None:
    edit(folder, change)
    assert said in refused(folder)


def test_another_base_is_refused_unless_forced(folder: Path) -> None:
    other = tiny_llama()
    torch.nn.init.normal_(other.model.layers[0].mlp.up_proj.weight)
    assert "trained on base" in refused(folder, other)
    forced = smidgen.PeftModel.from_pretrained(other, folder, force=True)
    assert forced.active_adapters == ["default"]


def test_the_same_base_in_another_dtype_or_folder_is_the_same(folder: Path, tmp_path: Path) -> None:
    tiny_llama().bfloat16().save_pretrained(tmp_path / "moved")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.float32)
    smidgen.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_unread(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    assert "refused unread: a pickle can run code" in refused(folder)


def test_broken_files(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    assert "not a readable safetensors file" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refused(folder) or "safetensors" in refused(folder)
    assert "no such adapter folder" in refused(folder / "nowhere")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"peft_type": "NOVEL"}, "peft_type 'NOVEL' is none of"),
        ({"lora_aplha": 3}, "no field 'lora_aplha'; did you mean 'lora_alpha'?"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens=[1, 2] is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"r": 10**9}, "r: must be a whole number from 1 to 65536"),
        ({"task_type": "os.system"}, "no 'os.system'"),
    ],
)
def test_a_configuration_that_asks_for_what_is_not_there(folder: Path, fields: dict[str, Any], said: str) -> None:
    edit_config(folder, **fields)
    assert said in refused(folder)


def test_nothing_that_is_not_finite_is_saved(tmp_path: Path) -> None:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules=["q_proj"]))
    next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(AdapterFileError, match="1 tensors are not finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / WEIGHTS).exists()
    with pytest.raises(UsageError, match="asks for a pickle"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_several_adapters_go_to_folders_of_their_own(tmp_path: Path) -> None:
    model = smidgen.get_peft_model(tiny_llama(), smidgen.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", smidgen.LoraConfig(target_modules=["v_proj"], r=2))
    model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).is_file() and (tmp_path / "second" / WEIGHTS).is_file()
    loaded = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert loaded.active_adapters == ["default"]
    assert loaded.peft_config["second"].r == 2


def test_loaded_for_further_training_is_trainable_and_otherwise_frozen(folder: Path) -> None:
    frozen = smidgen.PeftModel.from_pretrained(tiny_llama(), folder)
    assert frozen.get_nb_trainable_parameters()[0] == 0
    trained = smidgen.PeftModel.from_pretrained(tiny_llama(), folder, is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == 512
    assert torch.equal(logits(frozen, tokens()), logits(trained, tokens()))
