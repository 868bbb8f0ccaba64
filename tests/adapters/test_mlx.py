"""Adapters to mlx-lm's files and back, and what a layer of MLX would answer with them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import smidgen
from smidgen.cli.main import app
from smidgen.errors import AdapterFileError, UsageError
from smidgen.export.convert import convert_files
from tests.conftest import logits, perturb, tiny_gpt2, tiny_llama, tokens

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (tiny_llama, {"target_modules": ["q_proj", "up_proj"], "r": 4, "lora_alpha": 10}),
    "rslora": (tiny_llama, {"target_modules": "all-linear", "r": 5, "use_rslora": True, "lora_dropout": 0.1}),
    "dora": (tiny_llama, {"target_modules": ["q_proj"], "use_dora": True}),
    "layers": (tiny_llama, {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "Conv1D": (tiny_gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def written(folder: Path, case: str, library: Any) -> Any:
    build, options = CASES[case]
    torch.manual_seed(1)
    model = library.get_peft_model(build(), library.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    perturb(model)
    model.save_pretrained(folder)
    return model


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about peft's own calls
        yield


@pytest.mark.parametrize("library", [peft, smidgen], ids=["peft", "smidgen"])
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_every_byte_is_the_same(case: str, library: Any, tmp_path: Path) -> None:
    model = written(tmp_path / "peft", case, library)
    convert_files(tmp_path / "peft", tmp_path / "mlx", "mlx")
    convert_files(tmp_path / "mlx", tmp_path / "back", "peft")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert tensor.numpy().tobytes() == after[key].numpy().tobytes()
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "back")]
    assert configs[0] == configs[1]
    with no_warning():
        theirs = peft.PeftModel.from_pretrained(CASES[case][0](), str(tmp_path / "back")).eval()
    torch.testing.assert_close(logits(theirs, tokens()), logits(model, tokens()), atol=2e-5, rtol=1e-4)
    if library is smidgen:  # the base that it was trained on is still known
        other = CASES[case][0]()
        perturb(other, seed=9)
        with pytest.raises(AdapterFileError, match="trained on base"):
            smidgen.PeftModel.from_pretrained(other, tmp_path / "back")


def mlx_layer(
    weight: Tensor, bias: Tensor | None, parts: dict[str, Tensor], settings: dict[str, Any], x: Tensor
) -> Tensor:
    """What mlx-lm's LoRALinear or DoRALinear answers: `scale` as it is, A (in, R) and B (R, out)."""
    y = x @ weight.T + settings["scale"] * ((x @ parts["lora_a"]) @ parts["lora_b"])
    if "m" in parts:
        adapted = weight + (settings["scale"] * parts["lora_b"].T) @ parts["lora_a"].T
        y = parts["m"] / adapted.norm(dim=1) * y
    return y if bias is None else y + bias


@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "layers"])
def test_a_layer_of_mlx_answers_the_same(case: str, tmp_path: Path) -> None:
    model: Any = written(tmp_path / "peft", case, smidgen)
    convert_files(tmp_path / "peft", tmp_path / "mlx", "mlx")
    assert {path.name for path in (tmp_path / "mlx").iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    found = load_file(tmp_path / "mlx" / "adapters.safetensors")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == ("dora" if case == "dora" else "lora")
    settings = config["lora_parameters"]
    assert config["num_layers"] == -1 and settings.keys() == {"rank", "scale", "dropout", "keys"}
    checked = set()
    for path, module in model.named_modules():
        parts = {name: found[f"{path}.{name}"] for name in ("lora_a", "lora_b", "m") if f"{path}.{name}" in found}
        if parts:
            checked |= {f"{path}.{name}" for name in parts}
            assert any(path.endswith(f".{key}") for key in settings["keys"])
            x = torch.randn(3, module.in_features)
            torch.testing.assert_close(mlx_layer(module.weight, module.bias, parts, settings, x), module(x))
    assert checked == found.keys()


def of_mlx(folder: Path, scale: float = 20.0, **config: Any) -> dict[str, Tensor]:
    """An adapter as mlx-lm writes it, of the second layer alone."""
    made = {}
    for name, rows in (("q_proj", 32), ("v_proj", 16)):
        made[f"model.layers.1.self_attn.{name}.lora_a"] = torch.randn(32, 3)
        made[f"model.layers.1.self_attn.{name}.lora_b"] = torch.randn(3, rows) * 0.1
    fields = {"fine_tune_type": "lora", "num_layers": 1, "model": "some/model", "iters": 100, "batch_size": 4}
    fields |= {"lora_parameters": {"rank": 3, "scale": scale, "dropout": 0.0}} | config
    folder.mkdir(exist_ok=True)
    save_file(made, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return made


def test_what_mlx_trained_loads_here_and_in_peft(tmp_path: Path) -> None:
    found = of_mlx(tmp_path / "mlx")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "mlx"), str(tmp_path / "peft"), "--to", "peft"])
    assert result.exit_code == 0, result.output
    plain: Any = tiny_llama()
    layer = plain.model.layers[1].self_attn
    with torch.no_grad():
        for name in ("q_proj", "v_proj"):
            key = f"model.layers.1.self_attn.{name}"
            getattr(layer, name).weight += 20.0 * (found[f"{key}.lora_a"] @ found[f"{key}.lora_b"]).T
    for library in (smidgen, peft):
        with no_warning():
            model = library.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "peft")).eval()
        torch.testing.assert_close(logits(model, tokens()), logits(plain, tokens()), atol=2e-5, rtol=1e-4)
        assert model.peft_config["default"].base_model_name_or_path == "some/model"


def test_a_restored_configuration_is_not_taken_for_another_adapter(tmp_path: Path) -> None:
    written(tmp_path / "source", "lora", smidgen)
    convert_files(tmp_path / "source", tmp_path / "mlx", "mlx")
    path = tmp_path / "mlx" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_parameters"]["scale"] = 7.0  # as if trained anew, with the old folder's configuration
    path.write_text(json.dumps(config))
    convert_files(tmp_path / "mlx", tmp_path / "back", "peft")
    fields = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert math.isclose(fields["lora_alpha"] / fields["r"], 7.0)


def biased() -> nn.Module:
    return tiny_llama(bias=True)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "another method": (tiny_llama, smidgen.IA3Config(), "MLX has LoRA and DoRA, not ia3: first make it LoRA"),
    "unlike ranks": (
        tiny_llama,
        smidgen.LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3}),
        "one rank and one scale",
    ),
    "modules": (
        tiny_llama,
        smidgen.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
        "not .*norm.weight",
    ),
    "bias": (biased, smidgen.LoraConfig(target_modules=["q_proj"], lora_bias=True), "lora_B.bias"),
    "embedding": (tiny_llama, smidgen.LoraConfig(target_modules=["embed_tokens"]), "lora_embedding_A"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_cannot_hold_is_one_error_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    build, config, said = REFUSED[case]
    smidgen.get_peft_model(build(), config).save_pretrained(tmp_path / "source")
    with pytest.raises(UsageError, match=said):
        convert_files(tmp_path / "source", tmp_path / "mlx", "mlx")
    assert not (tmp_path / "mlx").exists()


def test_wrong_requests_are_told(tmp_path: Path) -> None:
    written(tmp_path / "source", "lora", smidgen)
    with pytest.raises(UsageError, match="must be lora, mlx, peft, per-expert, stacked, got 'gguf'"):
        convert_files(tmp_path / "source", tmp_path / "out", "gguf")
    with pytest.raises(AdapterFileError, match="with lora_parameters"):
        convert_files(tmp_path / "source", tmp_path / "out", "peft")
    with pytest.raises(UsageError, match="no experts in it"):
        tiny_llama().save_pretrained(tmp_path / "base")
        convert_files(tmp_path / "source", tmp_path / "out", "per-expert", str(tmp_path / "base"))
    made = of_mlx(tmp_path / "mlx")
    with pytest.raises(AdapterFileError, match="fine_tune_type full"):
        of_mlx(tmp_path / "mlx", fine_tune_type="full")
        convert_files(tmp_path / "mlx", tmp_path / "out", "peft")
    of_mlx(tmp_path / "mlx")
    made["model.layers.1.mlp.switch_mlp.up_proj.lora_a"] = torch.zeros(4, 3, 32)
    save_file(made, tmp_path / "mlx" / "adapters.safetensors")
    with pytest.raises(AdapterFileError, match=r"not LoRA or DoRA of linear layers: .*switch_mlp"):
        convert_files(tmp_path / "mlx", tmp_path / "out", "peft")
    with pytest.raises(AdapterFileError, match="smidgen convert --to peft"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "mlx")
    assert not (tmp_path / "out").exists()
