"""What is forecast from a configuration alone, against models that are really built and closed formulas."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from smidgen.errors import ModelError, UsageError
from smidgen.models.shapes import Described, describe_model, with_layers
from smidgen.recipe import Recipe, load_recipe
from smidgen.training import trials
from smidgen.training.devices import CONTEXT, GIB, Device, card, find_device, size
from smidgen.training.plan import Forecast
from smidgen.training.setup import make_trainable, prepare
from smidgen.training.ways import Outlook, Rows, Way, outlook_of, stored_bits, told, ways
from tests.conftest import TINY
from tests.models.test_gguf import write as write_gguf
from tests.training.conftest import write_recipe

ADAPTERS: list[dict[str, Any]] = [
    {"method": "lora", "r": 4, "target_modules": "all-linear"},
    {"method": "lora", "r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    {
        "method": "lora",
        "r": 4,
        "target_modules": ["up_proj"],
        "layers_to_transform": [1],
        "modules_to_save": ["model.norm"],
    },
    {"method": "freeze", "num_layers": 1},
    {"method": "full"},
]
KINDS = [adapter["method"] + str(len(adapter)) for adapter in ADAPTERS]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))


def recipe_of(path: Path, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
    recipe, _ = load_recipe(path)
    return replace(recipe, adapter=adapter or recipe.adapter, train=replace(recipe.train, **train))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ADAPTERS, ids=KINDS)
def test_counts_are_those_of_the_model_that_is_really_built(tmp_path, adapter):
    recipe = recipe_of(write_recipe(tmp_path), adapter)
    setup = prepare(recipe, None, lambda line: None)
    make_trainable(setup, lambda line: None)
    parameters = list(setup.model.parameters())
    counted = trials.count(describe_model(tmp_path / "base").config, recipe, torch.float32)
    assert counted.trained == sum(p.numel() for p in parameters if p.requires_grad)
    assert 4 * counted.linear + counted.other == sum(p.nbytes for p in parameters if not p.requires_grad)
    assert counted.layers == (1 if "layers_to_transform" in adapter or "num_layers" in adapter else 2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("real", [False, True], ids=["without memory", "real"])
@pytest.mark.parametrize("adapter", [ADAPTERS[0], ADAPTERS[-1]], ids=["lora", "full"])
@pytest.mark.parametrize("vocabulary", [48, 4096])
def test_deeper_models_take_what_shallow_ones_foretell(tmp_path, adapter, real, checkpointing, vocabulary):
    recipe = recipe_of(write_recipe(tmp_path), adapter, gradient_checkpointing=checkpointing)
    config = LlamaConfig(**TINY | {"num_hidden_layers": 9, "vocab_size": vocabulary}, tie_word_embeddings=True)
    rows = (50, 0.5)
    growth = trials.grow(config, recipe, torch.float32, rows, 400, real)
    for layers in (1, 9):
        there = trials._lived(with_layers(config, layers), recipe, torch.float32, trials._rows(*rows, 300), real)
        foretold = growth.at(layers, 300)
        assert foretold.activations + foretold.logits == pytest.approx(there.whole, rel=0.03)


def llama(width: int, inner: int, layers: int, heads: int) -> Described:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32_000,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    return Described(config, None, set())


def large_recipe(tmp_path: Path, r: int) -> Recipe:
    adapter = {"method": "lora", "r": r, "target_modules": "all-linear"}
    return recipe_of(write_recipe(tmp_path), adapter, gradient_checkpointing=True, micro_batch_tokens=512)


def silent(line: str) -> None:
    """Nobody listens."""


@pytest.mark.slow
def test_65_billion_parameters_fit_on_48_gb_and_not_on_24(tmp_path):
    """QLoRA, section 1 and 5: a 65B model on one GPU of 48 GB (https://arxiv.org/abs/2305.14314)."""
    recipe = replace(large_recipe(tmp_path, 64), data=replace(large_recipe(tmp_path, 64).data, max_length=512))
    model, rows = llama(8192, 22016, 80, 64), Rows(512, 1.0)
    outlook = Outlook(model, find_device("A6000", None, "auto"), rows, silent)
    full, lora, qlora = ways(recipe)
    found = outlook.forecast(qlora)
    linear = 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    norms, ends = 161 * 8192, 2 * 32_000 * 8192
    assert found.weights == int(linear * (4 + 8 / 64 + 32 / 16384) / 8) + 2 * (ends + norms)
    assert found.optimizer == 2 * found.trained + 4 * 2 * 7 * 80  # with the number of steps of each matrix
    assert found.trained == found.gradients == 4 * 80 * 64 * (8 * 8192 + 3 * (8192 + 22016))
    assert found.fits and found.peak == pytest.approx(48e9, rel=0.05)
    assert not outlook.forecast(lora).fits and not outlook.forecast(full).fits
    remedy = outlook.remedy(lora)
    assert remedy and remedy.changes == ("quantize=nf4",)
    small = Outlook(model, Device("", "cuda", 24 * GIB, torch.bfloat16, CONTEXT), rows, silent)
    small._grown, small._counted = outlook._grown, outlook._counted
    assert small.remedy(qlora) is None and "the model alone takes 37.66 GB" in told(
        qlora, small.forecast(qlora), None, small
    )


def test_7_billion_parameters_take_6_to_10_gb(tmp_path):
    outlook = Outlook(llama(4096, 11008, 32, 32), find_device("T4", None, "bfloat16"), Rows(512, 1.0), silent)
    for r, limits in ((8, (4.5e9, 7e9)), (64, (6e9, 10e9))):
        assert limits[0] < outlook.forecast(ways(large_recipe(tmp_path, r))[2]).peak < limits[1]


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3])
def test_the_cheapest_change_fits_and_holds_nothing_that_is_not_needed(tmp_path, share):
    adapter = ADAPTERS[0] | {"r": 64}
    recipe = recipe_of(write_recipe(tmp_path), adapter, micro_batch_tokens=2048, batch_size=32)
    recipe = replace(recipe, data=replace(recipe.data, max_length=512))
    model, rows = llama(256, 512, 4, 4), Rows(512, 1.0)
    roomy = Outlook(model, Device("", "cuda", 2**50, torch.bfloat16, 0), rows, silent)
    way = next(way for way in ways(recipe) if way.asked)
    memory = int(share * roomy.forecast(way).peak)
    tight = Outlook(model, replace(roomy.device, memory=memory), rows, silent)
    remedy = tight.remedy(way)
    assert remedy and tight.forecast(remedy).fits and not tight.forecast(way).fits
    if share == 0.9:
        assert remedy.changes == ("train.micro_batch_tokens=1024",)
    for change in remedy.changes:
        others = [f"{other}" for other in remedy.changes if other != change and other != "quantize=nf4"]
        fewer, _ = load_recipe(tmp_path / "recipe.yaml", [f"adapter={json.dumps(adapter)}", "data.max_length=512"])
        fewer = replace(fewer, train=recipe.train)
        for text in others:
            fewer = _overridden(fewer, text)
        kind = "nf4" if "quantize=nf4" in remedy.changes and change != "quantize=nf4" else None
        assert not tight.forecast(Way("", replace(fewer, quantize=kind))).fits, change


def _overridden(recipe: Recipe, text: str) -> Recipe:
    path, _, value = text.partition("=")
    section, name = path.split(".")
    part = getattr(recipe, section)
    made = part | {name: json.loads(value)} if isinstance(part, dict) else replace(part, **{name: json.loads(value)})
    return replace(recipe, **{section: made})


def test_a_folder_with_a_configuration_alone_is_enough(tmp_path):
    path = write_recipe(tmp_path)
    for file in (tmp_path / "base").iterdir():
        if file.name != "config.json":
            file.unlink()
    lines: list[str] = []
    plan = outlook_of(recipe_of(path), memory="1GB", say=lines.append)
    assert [way.title for way, _, _ in plan.found] == ["full", "lora", "lora nf4"]
    assert [way.asked for way, _, _ in plan.found] == [False, True, False]
    assert any("no tokenizer" in line and "max_length = 32" in line for line in lines)
    shutil.copy(tmp_path / "base" / "config.json", tmp_path / "own.json")
    alone = outlook_of(replace(recipe_of(path), model=str(tmp_path / "own.json")), memory="1GB", say=silent)
    assert [found.peak for _, found, _ in alone.found] == [found.peak for _, found, _ in plan.found]


def test_the_header_of_a_gguf_file_is_enough(tmp_path):
    path = write_recipe(tmp_path)
    model = write_gguf(tmp_path / "m.gguf", "llama")
    plan = outlook_of(replace(recipe_of(path), model=str(tmp_path / "m.gguf")), memory="1GB", say=silent)
    _, full, _ = plan.found[0]
    assert full.trained == 4 * sum(p.numel() for p in model.parameters())
    assert not (tmp_path / "cache" / "models").exists()


def test_this_machine_is_foretold_with_its_kernels_its_rows_and_its_time(tmp_path):
    path = write_recipe(tmp_path)
    plan = outlook_of(recipe_of(path), device="cpu", say=silent)
    assert plan.outlook.rows.count == 20 and plan.outlook.rows.longest < 32
    for _, found, _ in plan.found:
        assert isinstance(found, Forecast) and found.fits and found.rate and found.seconds
        assert found.libraries > 100e6


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("hidden_size", 2**40, "hidden_size is 1,099,511,627,776"),
        ("num_hidden_layers", 10**6, "num_hidden_layers is 1,000,000"),
        ("num_local_experts", 10**5, "num_local_experts is 100,000"),
        ("trust_remote_code", True, "asks to trust code"),
        ("model_type", "no_such_model", "no configuration of a model"),
    ],
)
def test_hostile_configurations_are_refused(tmp_path, field, value, words):
    config = LlamaForCausalLM(LlamaConfig(**TINY)).config.to_dict() | {field: value}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ModelError, match=words):
            describe_model(place)


def test_devices_are_found_by_their_names():
    for name in ("RTX 4090", "rtx-4090", "rtx_4090", "rtx4090"):
        assert card(name).memory == 24 * GIB
    with pytest.raises(UsageError, match=r"no 'rtx 409'; did you mean 'rtx4090'\?.*T4.*give --memory"):
        card("rtx 409")
    assert find_device("T4", None, "auto").dtype == torch.float32  # it computes in no bfloat16
    assert find_device("L4", None, "auto").dtype == torch.bfloat16
    assert find_device(None, "24GB", "float16").dtype == torch.float16
    with pytest.raises(UsageError, match="give one of the two"):
        find_device("L4", "24GB", "auto")


def test_sizes_are_read_as_people_write_them():
    assert [size(text) for text in ("24GB", "24 GiB", "1.5gb", "512MB", "24")] == [
        24 * 10**9,
        24 * GIB,
        15 * 10**8,
        512 * 10**6,
        24 * 10**9,
    ]
    for text in ("", "GB", "-1GB", "24 apples", "0GB"):
        with pytest.raises(UsageError, match="is no size"):
            size(text)


def test_bits_of_a_weight():
    assert stored_bits("nf4", torch.bfloat16) == pytest.approx(4.127, abs=1e-3)
    assert stored_bits("fp4", torch.bfloat16, double=False) == 4.5
    assert (stored_bits("int8", torch.bfloat16), stored_bits(None, torch.bfloat16)) == (8, 16)
    assert stored_bits(None, torch.float32) == 32
