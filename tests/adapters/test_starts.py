"""Starts of LoRA that need more than the weight: numbers against peft and bitsandbytes, files, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen
from smidgen.adapters.attach import adapters_of
from smidgen.errors import AdapterFileError, TargetError, UsageError
from smidgen.models.quantize import quantization_config, quantize_model
from tests.conftest import logits, perturb, tiny_llama, tokens
from tests.laws.cases import QV, batches

ALL_KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # peft's CorDA needs it and does not install it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def one_row_each() -> list[dict[str, Tensor]]:
    return [{"input_ids": row[None], "labels": row[None].clone()} for row in tokens(rows=4, length=30)]


def started(init: str, data: Any = None, model: nn.Module | None = None, **options: Any) -> Any:
    """A model that starts so, in eval mode."""
    config = smidgen.LoraConfig(**{"target_modules": ALL_KINDS, "r": 4} | options, init_lora_weights=init)
    model = tiny_llama() if model is None else model
    source: Any = {"weights": tiny_llama().state_dict()} if init == "loftq" else {"batches": data or batches()}
    smidgen.initialise_from(model, config, **source, say=lambda line: None)
    return smidgen.get_peft_model(model, config).eval()


def places(model: Any) -> dict[str, Any]:
    """The adapter of each layer, by path."""
    return dict(adapters_of(model, "default"))


def theirs_of(model: Any) -> dict[str, Any]:
    """peft's LoRA layers, by path."""
    found = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {path: module for path, module in found.items() if isinstance(module, peft.tuners.lora.LoraLayer)}


def same_products(
    ours: Any, theirs: Any, rtol: float = 1e-5, signed: bool = True, kinds: list[str] = ALL_KINDS
) -> None:
    """Whether A^T A and B B^T are equal at layers of these kinds and, where signs belong together, B A."""
    expected = theirs_of(theirs)
    found = places(ours)
    assert found.keys() == expected.keys()
    for path, adapter in found.items():
        if path.rpartition(".")[2] not in kinds:
            continue
        layer = expected[path]
        a, b = layer.lora_A["default"].weight.detach().double(), layer.lora_B["default"].weight.detach().double()
        assert adapter.r == layer.r["default"] and adapter.scaling == pytest.approx(layer.scaling["default"])
        own_a, own_b = (factor.weight.detach().double() for factor in (adapter.lora_A, adapter.lora_B))
        pairs = [(own_a.T @ own_a, a.T @ a), (own_b @ own_b.T, b @ b.T), (own_b @ own_a, b @ a)]
        for actual, wanted in pairs if signed else pairs[:2]:
            torch.testing.assert_close(actual, wanted, atol=rtol * max(1e-9, wanted.abs().max().item()), rtol=0)


@pytest.mark.parametrize("options", [{}, {"rho": 1.0}, {"whiten": True, "adjust_scaling_factors": False}, {"rho": 4.0}])
@pytest.mark.parametrize("given", [{}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32}}])
def test_eva_is_pefts(options: dict[str, Any], given: dict[str, Any]) -> None:
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in (tokens(6, 16), tokens(5, 20))]
    for batch in data:
        batch["labels"][:, :4] = -100
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -2:] = 0
    ours = started("eva", copy.deepcopy(data), eva_config=options, **copy.deepcopy(given))
    settings: Any = {"target_modules": ALL_KINDS, "r": 4, "init_lora_weights": "eva", **given}
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings, eva_config=peft.EvaConfig(**options)))
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    # Where layers share their inputs, peft divides what they share once for each of them.
    same_products(ours, theirs, kinds=["o_proj", "down_proj"] if "whiten" in options else ALL_KINDS)
    ranks = [adapter.r for adapter in places(ours).values()]
    wanted = [given.get("rank_pattern", {}).get(kind, 4) for kind in ALL_KINDS] * 2
    assert sum(ranks) == sum(wanted) and (ranks == wanted) == (options.get("rho") == 1.0)


def test_eva_leaves_out_layers_without_rank_and_comes_back_from_its_file(tmp_path: Path) -> None:
    ours = started("eva", r=1, eva_config={"rho": 4.0})
    there = list(places(ours))
    assert 0 < len(there) < 14
    perturb(ours)
    ours.save_pretrained(tmp_path)
    for load in (smidgen.PeftModel.from_pretrained, peft.PeftModel.from_pretrained):
        loaded = load(tiny_llama(), str(tmp_path)).eval()
        torch.testing.assert_close(logits(loaded, tokens()), logits(ours, tokens()), atol=1e-5, rtol=0)


def test_eva_tells_what_did_not_settle() -> None:
    with pytest.warns(UserWarning, match="eva: directions of 8 of 8 inputs did not settle; more batches help"):
        started("eva", eva_config={"tau": 1.0})


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_is_pefts(method: str) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    data = one_row_each()
    ours = started("corda", data, lora_alpha=16, corda_config={"corda_method": method})
    settings: Any = {"target_modules": ALL_KINDS, "r": 4, "lora_alpha": 16, "init_lora_weights": "corda"}
    config = peft.LoraConfig(
        **settings, corda_config=peft.tuners.lora.config.CordaConfig(corda_method=cast(Any, method))
    )
    base: Any = tiny_llama()

    def run() -> None:
        for batch in data:
            base(input_ids=batch["input_ids"])

    preprocess_corda(base, config, run)
    same_products(ours, peft.get_peft_model(base, config), rtol=1e-4 if method == "kpm" else 3e-5)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_is_pefts(direction: str, scale: str) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    data = batches()
    options: Any = {"direction": direction, "scale": scale}
    ours = started("lora_ga", data, r=8, lora_alpha=16, lora_ga_config=options)
    settings: Any = {"target_modules": ALL_KINDS, "r": 8, "lora_alpha": 16, "init_lora_weights": "lora_ga"}
    config = peft.LoraConfig(**settings, lora_ga_config=peft.tuners.lora.config.LoraGAConfig(**options))
    base: Any = tiny_llama()

    def step() -> None:
        for batch in data:
            base(**batch).loss.backward()

    preprocess_loraga(base, config, step)
    # A and B take their directions from other pairs; peft's largest singular value of the weight is an approximation.
    same_products(ours, peft.get_peft_model(base, config), 0.05 if scale == "weight_svd" else 1e-5, signed=False)


def test_lora_ga_leaves_the_base_as_it_was() -> None:
    model: Any = tiny_llama().requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    smidgen.initialise_from(model, smidgen.LoraConfig(target_modules=QV, init_lora_weights="lora_ga"), batches())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters()) and not model.training


def stored(kind: str) -> Any:
    model = tiny_llama()
    quantize_model(model, quantization_config(kind, dtype=torch.float32, double=False))
    return model


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_loftq_makes_up_for_what_storing_lost(kind: str, bits: int) -> None:
    weights = {name: tensor.double() for name, tensor in tiny_llama().state_dict().items()}
    left: dict[int, float] = {}
    for rounds in (1, 5):
        base, total, lost = stored(kind), 0.0, 0.0
        plain = {
            path: module.weight.double() for path, module in stored(kind).named_modules() if hasattr(module, "codes")
        }
        options = {"loftq_bits": bits, "loftq_iter": rounds}
        model = started("loftq", model=base, loftq_config=options, lora_alpha=12)
        for path, adapter in places(model).items():
            a, b = (factor.weight.detach().double() for factor in (adapter.lora_A, adapter.lora_B))
            kept, weight = model.get_submodule(path).weight.double(), weights[f"{path}.weight"]
            update = adapter.scaling * b @ a
            assert (rounds == 1) == torch.equal(kept, plain[path])
            if rounds == 1:  # the best approximation of rank 4: its error is that of the values left out
                values = torch.linalg.svdvals(weight - kept)[4:]
                torch.testing.assert_close((weight - kept - update).norm(), values.norm(), rtol=1e-4, atol=0)
            total += (weight - kept - update).norm().item()
            lost += (weight - plain[path]).norm().item()
        left[rounds] = total / lost
    assert left[5] < left[1] < 0.9


DOWN = "model.layers.0.mlp.down_proj"  # as wide as a block of scales, which bitsandbytes needs on some CPUs


def test_loftq_starts_from_bitsandbytes_codes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = tiny_llama().get_submodule(DOWN).weight.detach()
    kept = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    u, s, vh = torch.linalg.svd(weight - kept, full_matrices=False)
    adapter = places(started("loftq", model=stored("nf4")))[DOWN]
    found = adapter.scaling * adapter.lora_B.weight @ adapter.lora_A.weight
    torch.testing.assert_close(found.detach(), u[:, :4] * s[:4] @ vh[:4], atol=1e-5, rtol=0)


def test_loftq_reads_the_base_one_layer_at_a_time(tmp_path: Path) -> None:
    tensors = {name: tensor.detach() for name, tensor in tiny_llama().state_dict().items()}
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    for number, half in enumerate(halves):
        save_file(
            {name.removeprefix("model."): tensor for name, tensor in half.items()}, tmp_path / f"{number}.safetensors"
        )
    config = smidgen.LoraConfig(target_modules=ALL_KINDS, r=4, init_lora_weights="loftq")
    model = stored("nf4")
    said: list[str] = []
    smidgen.initialise_from(model, config, weights=tmp_path, say=said.append)
    expected = started("loftq", model=stored("nf4"))
    assert torch.equal(logits(smidgen.get_peft_model(model, config), tokens()), logits(expected, tokens()))
    assert said[0].startswith("start: loftq for 14 of 14 linear layers; ")
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(UsageError, match=r"weights: 0 tensors for 'model\.layers\.0\.self_attn"):
        smidgen.initialise_from(stored("nf4"), config, weights=tmp_path)


def test_a_base_that_loftq_stored_anew_is_the_only_one_for_its_adapter(tmp_path: Path) -> None:
    base = stored("nf4")
    config = smidgen.LoraConfig(
        target_modules=ALL_KINDS, r=4, init_lora_weights="loftq", loftq_config={"loftq_iter": 3}
    )
    smidgen.initialise_from(base, config, weights=tiny_llama().state_dict())
    again = copy.deepcopy(base)
    model = smidgen.get_peft_model(base, config)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="other weights or another shape"):
        smidgen.PeftModel.from_pretrained(stored("nf4"), tmp_path)
    loaded = smidgen.PeftModel.from_pretrained(again, tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


# ---- files ----


TAKING = {
    "corda": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "corda rslora dora": {"use_rslora": True, "use_dora": True, "lora_alpha": 3},
    "lora_ga": {"target_modules": [*QV, "embed_tokens"]},
}


@pytest.mark.parametrize("case", TAKING)
def test_what_was_taken_from_the_base_is_in_the_file_for_every_tool(case: str, tmp_path: Path) -> None:
    model = started(case.partition(" ")[0], **{"target_modules": QV} | TAKING[case])
    torch.testing.assert_close(logits(model, tokens()), logits(tiny_llama(), tokens()), atol=1e-5, rtol=0)
    perturb(model)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "first")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "first")).eval()
    torch.testing.assert_close(logits(theirs, tokens()), expected, atol=1e-5, rtol=0)
    loaded = smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True)
    own, original = loaded.peft_config["default"], model.peft_config["default"]
    assert (own.r, own.rank_pattern, own.init_lora_weights) == (4, original.rank_pattern, case.partition(" ")[0])
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    perturb(loaded, seed=9)
    loaded.load_state_dict(first)  # as transformers' Trainer resumes
    torch.testing.assert_close(logits(loaded.eval(), tokens()), expected)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_that_leaves_out_what_was_taken_is_refused(init: str, tmp_path: Path) -> None:
    theirs: Any = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=QV))
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=f"'{init}' took a part of the base's weights, .* path_initial_model"):
        smidgen.PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_a_loftq_file_says_only_what_it_is(tmp_path: Path) -> None:
    model = started("loftq", model=stored("nf4"))
    perturb(model)
    model.save_pretrained(tmp_path)
    assert smidgen.LoraConfig.from_pretrained(tmp_path).init_lora_weights is True
    loaded = smidgen.PeftModel.from_pretrained(stored("nf4"), tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eva_config": {"roh": 1}}, "eva_config: no field 'roh'; did you mean 'rho'?"),
        ({"eva_config": {"rho": 0.5}}, "eva_config: rho must be 1 or more and tau from 0 to 1, got rho 0.5"),
        ({"corda_config": {"corda_method": "ipn"}}, "corda_config.corda_method: must be 'ipm' or 'kpm', got \"ipn\""),
        ({"lora_ga_config": 3}, "lora_ga_config: must be a mapping of fields to values, got 3"),
        ({"lora_ga_config": {"stable_gamma": 0}}, "lora_ga_config.stable_gamma: must be a whole number from 1, got 0"),
        ({"loftq_config": {"loftq_bits": 2}}, "loftq_config.loftq_bits: 4 or 8, got 2"),
        ({"init_batches": 0}, "init_batches: must be a whole number from 1"),
        ({"init_lora_weights": "evo"}, "init_lora_weights: no 'evo'; did you mean 'eva'?"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        smidgen.LoraConfig(**options)
    assert said in str(caught.value)


def test_what_is_missing_is_named() -> None:
    for init, source in (("eva", "batches"), ("corda", "batches"), ("lora_ga", "batches"), ("loftq", "weights")):
        config, model = smidgen.LoraConfig(target_modules=QV, init_lora_weights=init), tiny_llama()
        with pytest.raises(
            TargetError, match=rf"call smidgen\.initialise_from\(model, config, {source}=\.\.\.\) before"
        ):
            smidgen.get_peft_model(model, config)
        with pytest.raises(UsageError, match=f"'{init}' is computed from {source}, and there are none"):
            smidgen.initialise_from(model, config)
        assert type(model) is type(tiny_llama())
    with pytest.raises(UsageError, match="needs no data or weights; eva, corda, lora_ga, loftq do"):
        smidgen.initialise_from(tiny_llama(), smidgen.LoraConfig(), batches())


@pytest.mark.parametrize(
    ("init", "options", "data", "said"),
    [
        ("eva", {"r": 16}, batches()[:1], "batches: each needs 32 tokens that count"),
        ("lora_ga", {}, [{"input_ids": tokens()}], "batches: the model answers no loss; give labels"),
        ("lora_ga", {"r": 12}, None, "k_proj: r: 12 asks for more directions than a weight"),
        ("corda", {"r": 20}, None, "k_proj: r: 20 asks for more directions than a weight"),
        ("loftq", {"loftq_config": {"loftq_bits": 8}}, None, "'loftq' makes up for a base in 4 or 8 bits"),
    ],
)
def test_a_source_that_does_not_do_is_refused(init: str, options: dict[str, Any], data: Any, said: str) -> None:
    if "tokens that count" in said:
        data = [{"input_ids": batch["input_ids"][:2], "labels": batch["labels"][:2]} for batch in data]
    with pytest.raises(UsageError) as caught:
        started(init, data, **options)
    assert said in str(caught.value)


def test_a_start_fits_only_the_configuration_that_it_was_computed_for() -> None:
    config = smidgen.LoraConfig(target_modules=QV, init_lora_weights="corda")
    smidgen.initialise_from(tiny_llama(), config, batches(), say=lambda line: None)
    config.r = 4
    with pytest.raises(TargetError, match="was measured for rank 8 of another layer or configuration, not for rank 4"):
        smidgen.get_peft_model(tiny_llama(), config)
    config = smidgen.LoraConfig(target_modules=QV, init_lora_weights="loftq", loftq_config={"loftq_bits": 8})
    with pytest.raises(UsageError, match=r"loftq_bits: 8, the base is stored in \{4\}"):
        smidgen.initialise_from(stored("nf4"), config, weights=tiny_llama().state_dict())
