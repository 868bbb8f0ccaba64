"""LoRA of the experts of a mixture: against peft, merged, in both layouts of files, and never in part unsaid."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen
from smidgen.adapters.attach import weight_changes
from smidgen.errors import AdapterFileError, TargetError, UsageError
from smidgen.export.convert import convert_files
from smidgen.recipe import load_recipe
from smidgen.training.setup import make_trainable, prepare
from tests.conftest import TINY, logits, perturb, tokens
from tests.training import conftest

EXPERTS = 4
STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral(**sizes: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**TINY | sizes, num_local_experts=EXPERTS, num_experts_per_tok=2)
    return seeded(MixtralForCausalLM(config))


def qwen() -> nn.Module:
    """Its first layer has no experts: what they are called is there as layers too."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    config = Qwen3MoeConfig(**TINY, **sizes, mlp_only_layers=[0], norm_topk_prob=True)
    return seeded(Qwen3MoeForCausalLM(config))


def seeded(model: nn.Module) -> nn.Module:
    with torch.no_grad():  # stacks may start unset
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


MODELS: dict[str, Any] = {"mixtral": mixtral, "qwen": qwen}
OPTIONS: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": [], "target_parameters": STACKS, "r": 3},
    "and attention": {"target_modules": ["q_proj", "v_proj"], "target_parameters": STACKS, "use_rslora": True},
    "one stack": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["gate.weight", *STACKS], "r": 2},
    "patterns": {
        "target_modules": ["q_proj"],
        "target_parameters": STACKS,
        "rank_pattern": {"experts.gate_up_proj": 16},
        "alpha_pattern": {"experts.down_proj": 32},
    },
}


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def adapted(build: Any, options: dict[str, Any], library: Any = smidgen) -> Any:
    torch.manual_seed(1)
    model = library.get_peft_model(build(), library.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    perturb(model, scale=0.3)
    return model


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


def same_tensors(here: Path, there: Path) -> None:
    ours, theirs = tensors_of(here), tensors_of(there)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)


@pytest.mark.parametrize("case", OPTIONS)
def test_files_and_answers_are_pefts_both_ways(build: Any, case: str, tmp_path: Path) -> None:
    ours, theirs = adapted(build, OPTIONS[case]), adapted(build, OPTIONS[case], peft)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    shapes = [{key: tensor.shape for key, tensor in tensors_of(tmp_path / name).items()} for name in ("ours", "theirs")]
    assert shapes[0] == shapes[1]
    here = smidgen.PeftModel.from_pretrained(build(), tmp_path / "theirs")
    torch.testing.assert_close(logits(here, tokens()), logits(theirs, tokens()), atol=2e-5, rtol=1e-5)
    there = peft.PeftModel.from_pretrained(build(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(there, tokens()), logits(ours, tokens()), atol=2e-5, rtol=1e-5)
    assert not torch.allclose(logits(here, tokens()), logits(build(), tokens()), atol=1e-2)


@pytest.mark.parametrize("case", OPTIONS)
def test_merged_switched_off_and_back(build: Any, case: str) -> None:
    model, base = adapted(build, OPTIONS[case]), logits(build(), tokens())
    expected, before = logits(model, tokens()), {name: t.clone() for name, t in model.state_dict().items()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model, tokens()), expected, atol=2e-5, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens()), base)
    plain = model.merge_and_unload()
    assert type(plain) is type(build()) and plain.state_dict().keys() == build().state_dict().keys()
    torch.testing.assert_close(logits(plain, tokens()), expected, atol=2e-5, rtol=1e-5)


def test_starts_as_the_base_and_every_factor_is_trained(build: Any) -> None:
    options = OPTIONS["router"]
    model = smidgen.get_peft_model(build(), smidgen.LoraConfig(**options))
    torch.testing.assert_close(logits(model, tokens()), logits(build(), tokens()))
    perturb(model)
    model.train()
    expected: dict[str, Tensor] = {}
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits(model, tokens()).square().mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient.abs().max() > 0 for gradient in found.values())
        expected = expected or found
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)
    changed = dict(weight_changes(model))
    assert sum("gate_up_proj" in path for path in changed) == len(list(stacks_in(model)))
    assert all(value > 0 for value in changed.values())


def stacks_in(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if path.endswith(".experts")]


def test_over_a_16_bit_base_the_adapter_stays_in_fp32(build: Any) -> None:
    model = smidgen.get_peft_model(build().bfloat16(), smidgen.LoraConfig(**OPTIONS["experts"]))
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert logits(model, tokens()).isfinite().all()


def test_rows_of_a_batch_are_refused_by_name(build: Any) -> None:
    model = adapted(build, OPTIONS["experts"])
    with pytest.raises(UsageError, match="ParameterLora works on a whole batch"):
        model(tokens(), adapter_names=["default", "__base__", "default"])


# ---- each expert by itself ----


def per_expert(build: Any, folder: Path, shared: bool = False, dense: bool = False) -> Path:
    """A file as of before transformers 5: gate and up each have an A or share it; the dense layer is in it or not."""
    old = build is mixtral
    names, block = (("w1", "w3", "w2"), "block_sparse_moe") if old else (("gate_proj", "up_proj", "down_proj"), "mlp")
    width, r = (64, 4) if old else (24, 4)
    layers = (0, 1) if old else (1,)
    generator = torch.Generator().manual_seed(3)
    made = {}
    for layer in (0, 1):
        shapes = {f"self_attn.{name}": (32, rows) for name, rows in (("q_proj", 32), ("v_proj", 16))}
        if layer in layers:
            shapes |= {
                f"{block}.experts.{expert}.{name}": (width, 32) if name == names[2] else (32, width)
                for expert in range(EXPERTS)
                for name in names
            }
        elif dense:
            shapes |= {f"mlp.{name}": (64, 32) if name == names[2] else (32, 64) for name in names}
        for path, (columns, rows) in shapes.items():
            for side, shape in (("A", (r, columns)), ("B", (rows, r))):
                key = f"base_model.model.model.layers.{layer}.{path}.lora_{side}.weight"
                made[key] = torch.randn(shape, generator=generator) * 0.3
    for key in list(made):
        if shared and f".{names[1]}.lora_A" in key and ".experts." in key:
            made[key] = made[key.replace(f".{names[1]}.", f".{names[0]}.")].clone()
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 6, "inference_mode": True}
    fields |= {"target_modules": ["q_proj", "v_proj", *names]}
    folder.mkdir()
    save_file(made, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def base(build: Any, tmp_path: Path) -> Path:
    build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("shared", [False, True], ids=["own A", "one A"])
def test_per_expert_files_round_trip_exactly_and_answer_as_peft_reads_them(
    build: Any, base: Path, shared: bool, tmp_path: Path
) -> None:
    dense = shared and build is qwen
    source = per_expert(build, tmp_path / "source", shared, dense)
    convert_files(source, tmp_path / "stacked", "stacked", str(base))
    convert_files(tmp_path / "stacked", tmp_path / "again", "per-expert", str(base))
    same_tensors(source, tmp_path / "again")
    assert (
        config_of(tmp_path / "again").items()
        >= {k: v for k, v in config_of(source).items() if k != "target_modules"}.items()
    )
    named = [set(config_of(folder)["target_modules"]) for folder in (source, tmp_path / "again")]
    if build is mixtral:
        assert named[0] == named[1]
    else:  # a bare name means the dense layer too, so the experts are named in full
        assert {name.rpartition(".")[2] for name in named[1]} == named[0]
    model = smidgen.PeftModel.from_pretrained(build(), source)
    stacked = smidgen.PeftModel.from_pretrained(build(), tmp_path / "stacked")
    assert torch.equal(logits(model, tokens()), logits(stacked, tokens()))
    ranks = {
        t.shape[0]
        for key, t in tensors_of(tmp_path / "stacked").items()
        if key.endswith("experts.base_layer.lora_A.weight")
    }
    assert ranks == {(4 if shared else 8) * EXPERTS}
    if not dense:  # whose layers peft takes for experts
        for folder in (tmp_path / "stacked", source):
            with warnings.catch_warnings(action="ignore"):
                theirs = peft.PeftModel.from_pretrained(build(), str(folder)).eval()
            torch.testing.assert_close(logits(theirs, tokens()), logits(model, tokens()), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["experts", "and attention", "one stack", "router", "patterns"])
def test_stacks_round_trip_exactly_by_way_of_single_experts(build: Any, base: Path, case: str, tmp_path: Path) -> None:
    model = adapted(build, OPTIONS[case])
    model.save_pretrained(tmp_path / "source")
    convert_files(tmp_path / "source", tmp_path / "single", "per-expert", str(base))
    assert any(".experts.3." in key for key in tensors_of(tmp_path / "single"))
    convert_files(tmp_path / "single", tmp_path / "again", "stacked", str(base))
    same_tensors(tmp_path / "source", tmp_path / "again")
    assert config_of(tmp_path / "again") == config_of(tmp_path / "source")
    again = smidgen.PeftModel.from_pretrained(build(), tmp_path / "single")
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_single_experts_answer_by_the_formula(tmp_path: Path) -> None:
    """Against each expert's own product, written out."""
    source = per_expert(mixtral, tmp_path / "source")
    model: Any = smidgen.PeftModel.from_pretrained(mixtral(), source).merge_and_unload()
    plain: Any = mixtral()
    found, key = tensors_of(source), "base_model.model.model.layers.1.block_sparse_moe.experts.2"
    delta = {n: 1.5 * found[f"{key}.{n}.lora_B.weight"] @ found[f"{key}.{n}.lora_A.weight"] for n in ("w1", "w2", "w3")}
    ours, base = model.model.layers[1].mlp.experts, plain.model.layers[1].mlp.experts
    torch.testing.assert_close(ours.gate_up_proj[2], base.gate_up_proj[2] + torch.cat([delta["w1"], delta["w3"]]))
    torch.testing.assert_close(ours.down_proj[2], base.down_proj[2] + delta["w2"])


# ---- nothing in part without a word ----


def test_attention_alone_says_that_the_experts_are_left(build: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for options, said in [
        ({"target_modules": ["q_proj", "v_proj"]}, "experts: not adapted (experts.gate_up_proj x"),
        ({}, "experts: not adapted (experts.gate_up_proj x"),
        (OPTIONS["one stack"], "experts: adapted in part; not (experts.gate_up_proj x"),
    ]:
        adapted(build, options).print_trainable_parameters()
        assert said in capsys.readouterr().out
    adapted(build, OPTIONS["experts"]).print_trainable_parameters()
    assert "experts" not in capsys.readouterr().out


def test_a_run_says_it_too(tmp_path: Path) -> None:
    path = conftest.write_recipe(tmp_path)
    mixtral(vocab_size=len(conftest.WORDS)).save_pretrained(tmp_path / "base")
    told: list[str] = []
    make_trainable(prepare(load_recipe(path)[0], None, told.append), told.append)
    left = "experts: not adapted (experts.gate_up_proj x2, experts.down_proj x2); target_parameters adapts them"
    assert left in told


def test_names_of_projections_that_are_stacked_are_told() -> None:
    with pytest.raises(TargetError, match=r"'w1' matches 0 modules.*target_parameters: experts.gate_up_proj x2"):
        smidgen.get_peft_model(mixtral(), smidgen.LoraConfig(target_modules=["q_proj", "w1"]))
    with pytest.warns(UserWarning, match=r"up_proj: of layers outside the experts only.*experts.gate_up_proj x1"):
        smidgen.get_peft_model(qwen(), smidgen.LoraConfig(target_modules=["up_proj"]))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no such": (
        {"target_parameters": ["experts.gate_up"]},
        r"matches 0 parameters; did you mean 'experts.gate_up_proj'",
    ),
    "dropout": (
        {"target_parameters": STACKS, "lora_dropout": 0.1},
        "lora_dropout: not together with target_parameters",
    ),
    "dora": ({"target_parameters": STACKS, "use_dora": True}, "use_dora: not together"),
    "layers": ({"target_parameters": STACKS, "layers_to_transform": [1]}, "layers_to_transform: not together"),
    "vector": ({"target_parameters": ["input_layernorm.weight"]}, "neither a matrix nor a stack"),
    "pattern": ({"target_parameters": STACKS, "rank_pattern": {"w1": 2}}, "'w1' matches none"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_change_nothing(case: str) -> None:
    model = mixtral()
    with pytest.raises(TargetError, match=WRONG[case][1]):
        smidgen.get_peft_model(model, smidgen.LoraConfig(target_modules=["q_proj"], **WRONG[case][0]))
    assert type(model) is type(mixtral()) and not hasattr(model.get_submodule("model.layers.0.mlp.experts"), "adapters")


def test_a_file_of_some_experts_is_refused(base: Path, build: Any, tmp_path: Path) -> None:
    source = per_expert(build, tmp_path / "source")
    whole, up = tensors_of(source), "w3" if build is mixtral else "up_proj"
    for left_out, said in [
        (".experts.2.", r"of experts \[2\]; one stack holds all 4"),
        (f".{up}.", f"no {up} of experts"),
    ]:
        kept = {key: t for key, t in whole.items() if not (left_out in key and ".experts." in key)}
        save_file(kept, source / "adapter_model.safetensors")
        model = build()
        with pytest.raises(AdapterFileError, match=said):
            smidgen.PeftModel.from_pretrained(model, source)
        assert type(model) is type(build())


def test_combining_and_converting_refuse_by_name(build: Any) -> None:
    model = adapted(build, OPTIONS["experts"])
    with pytest.raises(UsageError, match="target_parameters"):
        model.add_weighted_adapter(["default"], [0.5], "half", "cat")
    from smidgen.models.conversion import convert_to_lora

    with pytest.raises(UsageError, match="target_parameters"):
        convert_to_lora(model, 4)
