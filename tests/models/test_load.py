from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen.errors import ModelError
from smidgen.models.load import choose_dtype, load_model, stop_token_ids

CPU = torch.device("cpu")


def test_loads_and_says_what_was_chosen(folder: Path):
    lines: list[str] = []
    model, tokenizer = load_model(folder, "float32", device=CPU, say=lines.append)
    assert len(lines) == 1 and "cpu" in lines[0] and "float32 (as asked)" in lines[0]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_nothing_is_printed_by_transformers(folder: Path, capfd: pytest.CaptureFixture[str]):
    load_model(folder, device=CPU, say=lambda line: None)
    assert capfd.readouterr() == ("", "")


def test_the_end_of_turn_of_the_template_stops_too(folder: Path):
    model, tokenizer = load_model(folder, device=CPU, say=lambda line: None)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert stop_token_ids(model, tokenizer) == {0, 2}
    model.generation_config.eos_token_id = [7, 8]
    assert stop_token_ids(model, tokenizer) == {0, 2, 7, 8}
    tokenizer.chat_template = None
    assert stop_token_ids(model, tokenizer) == {0, 7, 8}


def test_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch):
    for flags, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert choose_dtype("auto", CPU)[0] == dtype
    assert choose_dtype("float16", CPU)[0] == torch.float16
    with pytest.raises(ModelError, match="'fp8' is none of auto, float32"):
        choose_dtype("fp8", CPU)


def test_missing_weights_are_refused(folder: Path, tmp_path: Path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*layers\.1\.mlp\.up_proj"):
        load_model(broken, device=CPU, say=lambda line: None)


def test_an_architecture_with_own_code_is_refused_and_not_run(folder: Path, tmp_path: Path):
    foreign = shutil.copytree(folder, tmp_path / "foreign")
    marker = tmp_path / "ran"
    config = json.loads((foreign / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "nobody_knows", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (foreign / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (foreign / "code.py").write_text(f"open({os.fspath(marker)!r}, 'w')", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(foreign, device=CPU, say=lambda line: None)
    assert not marker.exists()
