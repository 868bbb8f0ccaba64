from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from smidgen.errors import RecipeError
from smidgen.flow import load_flow
from smidgen.recipe import (
    DataRecipe,
    GeneralRecipe,
    PreferenceRecipe,
    Recipe,
    Source,
    TrainRecipe,
    WatchRecipe,
    adapter_config,
    difference,
    load_recipe,
    recipe_hash,
)

ROOT = Path(__file__).parent.parent

SMALL = """\
model: m
adapter: {method: lora, r: 4}
data:
  train: a.jsonl
output: out
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes r.yaml into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> Path:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return Path("r.yaml")

    return write


def wrong(path: Path, *overrides: str) -> list[str]:
    """The lines of the error that a recipe makes."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_the_least_recipe_gets_the_defaults(write):
    recipe, notes = load_recipe(write(SMALL))
    assert notes == []
    assert recipe == Recipe(
        model="m", adapter={"method": "lora", "r": 4}, data=DataRecipe([Source("a.jsonl")]), output="out"
    )
    assert recipe.train == TrainRecipe(epochs=1, learning_rate=2e-4, batch_size=16)
    assert (recipe.seed, recipe.objective, recipe.data.max_length) == (42, "sft", 1024)


def test_every_mistake_is_told_at_once_with_its_line(write):
    path = write(
        """\
model: m
adapter:
  method: lora
  r: "8"
  lora_aplha: 16
data:
  train: [a.jsonl, {path: b.jsonl, wieght: 2}]
  max_length: 0
  eval_size: 1.5
  on_long: truncat
  packing: maybe
train:
  epochs: -1
  batch_size: true
  optim: adamm
  bf16: true
  max_length: 9
seed: 1
seed: 2
"""
    )
    assert wrong(path, "train.learning_rate=fast", "dat.x=1", "train.epochs") == [
        "r.yaml:1: recipe: the field 'output' is missing",
        'r.yaml:4: adapter.r: must be a whole number, got "8"',
        "r.yaml:5: adapter: no field 'lora_aplha'; did you mean 'lora_alpha'?",
        "r.yaml:7: data.train[1]: no field 'wieght'; did you mean 'weight'?",
        "r.yaml:8: data.max_length: must be greater than or equal to 2, got 0",
        "r.yaml:9: data.eval_size: must be a whole number or less than 1, got 1.5",
        "r.yaml:10: data.on_long: must be 'drop', 'truncate', 'truncate_prompt' or 'error', got \"truncat\"; "
        "did you mean 'truncate'?",
        'r.yaml:11: data.packing: must be true or false, got "maybe"',
        "r.yaml:13: train.epochs: must be greater than 0, got -1",
        "r.yaml:14: train.batch_size: must be a whole number, got true",
        "r.yaml:15: train.optim: must be 'adamw', 'adamw_8bit', 'paged_adamw', 'paged_adamw_8bit', 'lion', "
        "'lion_8bit', 'paged_lion', 'paged_lion_8bit' or 'adafactor', got \"adamm\"; did you mean 'adamw'?",
        "r.yaml:16: train: no field 'bf16'; write 'dtype: bfloat16' in 'train'",
        "r.yaml:17: train: no field 'max_length'; it belongs in 'data'",
        "r.yaml:19: seed: given twice, first on line 18; keep one",
        "override 'train.epochs': must be of the form key.path=value, such as train.epochs=3",
        "override 'dat.x=1': recipe: no field 'dat'; did you mean 'data'?",
        "override 'train.learning_rate=fast': train.learning_rate: must be a number, got \"fast\"",
    ]


def test_a_value_of_the_method_s_own_checks_is_told_with_its_place(write):
    text = SMALL.replace("r: 4", "r: 4, task_type: CAUSAL")
    (line,) = wrong(write(text))
    assert line.startswith("r.yaml:2: adapter") and "CAUSAL_LM" in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "r.yaml: the file is empty; a recipe needs model, adapter, data and output"),
        ("- a", "r.yaml:1: a recipe is a mapping of fields to values, such as 'model: gpt2'"),
        ("a: [1\nb: c", "r.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        ("a: 1\n---\nb: 1", "r.yaml:2: not valid YAML: but found another document"),
        (
            "a: !!python/object/apply:os.getcwd []",
            "r.yaml:1: a: the YAML tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is not read",
        ),
        ("a: !!python/name:os.system x", "r.yaml:1: not valid YAML: could not determine a constructor"),
        ("a: &a [*a]", "or an alias that contains itself"),
        ("[" * 5000, "r.yaml: nested too deeply"),
        ("a: " + "x" * 1_000_001, "larger than 100,000 bytes"),
        ("a: \x00", "holds a NUL character"),
        (SMALL + "[1]: 2", "r.yaml:6: a field name must be plain text"),
        (SMALL.replace("m\n", "2024-13-45\n", 1), "r.yaml:1: model: cannot be read: month must be in 1..12"),
        (SMALL.replace("{method: lora, r: 4}", "lora"), "r.yaml:2: adapter: must be a mapping of fields to values"),
        (SMALL.replace("lora", "lroa"), "r.yaml:2: adapter.method: no 'lroa'; did you mean 'lora'?"),
        (SMALL.replace("method: lora, ", ""), "r.yaml:2: adapter: 'method' must be one of: lora, "),
        (SMALL.replace("a.jsonl", "[]"), "r.yaml:4: data.train: must not be empty"),
        (SMALL.replace("a.jsonl", "3"), "r.yaml:4: data.train: must be a list, got 3"),
        (SMALL.replace("m\n", "''\n", 1), "r.yaml:1: model: must not be empty"),
        (SMALL + "train: {epochs: .nan}", "r.yaml:6: train.epochs: must be"),
        (SMALL + "task: seq_cls\nobjective: pretrain", "objective: 'task: seq_cls' learns from labels; leave out"),
        (SMALL + "task: seq_clas", "task: "),
        (SMALL + "train: {eval_steps: 5}", "r.yaml:6: train.eval_steps: there are no held-out rows"),
        (SMALL + "train: {save_total_limit: 5}", "r.yaml:6: train.save_total_limit: no checkpoints are written"),
        (SMALL.replace("  train", "  eval: b\n  eval_size: 2\n  train"), "r.yaml:5: data.eval_size: 'eval' names"),
        (SMALL.replace("a.jsonl", "[{path: a, weight: 1}, b]"), "r.yaml:4: data.train[1]: has no weight while"),
        (
            SMALL.replace("  train", "  system: s\n  train") + "objective: pretrain",
            "r.yaml:4: data.system: has no effect",
        ),
        (SMALL + "train: {warmup_steps: 5}", "no field 'warmup_steps'; write 'warmup_ratio'"),
        (SMALL + "gradient_accumulation_steps: 5", "micro-batches are cut by 'micro_batch_tokens'"),
    ],
)
def test_a_bad_file_is_told_plainly(write, text, told):
    lines = wrong(write(text))
    assert any(told in line for line in lines), lines


def test_an_alias_bomb_is_refused_at_once(write):
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (line,) = wrong(write("\n".join(layers)))
    assert line == "r.yaml: more than 10,000 values, aliases counted; this is no recipe"


def test_files_that_cannot_be_read(write, tmp_path):
    write(SMALL)
    assert wrong(Path("s.yaml")) == ["s.yaml: no such file; did you mean 'r.yaml'?"]
    assert wrong(tmp_path)[0].startswith(f"{tmp_path}: is not a regular file")
    Path("r.yaml").write_bytes(b"model: caf\xe9")
    assert wrong(Path("r.yaml")) == ["r.yaml: not UTF-8 (byte 10); save the file as UTF-8"]


def test_overrides(write):
    path = write(SMALL)
    recipe, _ = load_recipe(
        path, ["train.epochs=3", "adapter.r=16", "train.learning_rate=2e-5", "data.train=[b.jsonl, c.jsonl]", "seed=7"]
    )
    assert recipe.train.epochs == 3 and recipe.train.learning_rate == 2e-5
    assert recipe.adapter == {"method": "lora", "r": 16}
    assert recipe.data.train == [Source("b.jsonl"), Source("c.jsonl")]
    assert recipe.seed == 7
    assert wrong(path, "train.epocs=3") == ["override 'train.epocs=3': train: no field 'epocs'; did you mean 'epochs'?"]
    assert wrong(path, "model.name=3") == ["override 'model.name=3': 'model' has no fields"]
    assert wrong(path, "seed=[") == ["override 'seed=[': the value is not valid YAML"]


def test_an_override_mends_a_mistake_of_the_file(write):
    recipe, _ = load_recipe(write(SMALL + "train: {epochs: -1}"), ["train.epochs=2"])
    assert recipe.train.epochs == 2


def test_brief_and_full_forms_are_the_same(write):
    brief, _ = load_recipe(write(SMALL + "train: {report_to: tensorboard}"))
    full = SMALL.replace("a.jsonl", "[{path: a.jsonl}]") + "train: {report_to: [tensorboard]}"
    assert load_recipe(write(full))[0] == brief
    assert load_recipe(write(SMALL + "train: {report_to: none}"))[0].train.report_to == []


def test_columns_and_weights(write):
    text = SMALL.replace("a.jsonl", "\n  - {path: a, weight: 1, columns: {instruction: q}}\n  - {path: b, weight: 0.5}")
    recipe, _ = load_recipe(write(text))
    assert recipe.data.train == [Source("a", 1.0, {"instruction": "q"}), Source("b", 0.5)]


def test_other_spellings_are_understood_with_a_note(write):
    text = SMALL.replace("  train", "  max_seq_length: 512\n  train").replace("model:", "model_name_or_path:")
    recipe, notes = load_recipe(write(text + "train: {num_train_epochs: 2}"), ["train.lr=1e-3"])
    assert recipe.data.max_length == 512 and recipe.train == TrainRecipe(epochs=2, learning_rate=1e-3)
    assert sorted(notes) == [
        "'data.max_seq_length' is 'data.max_length' here",
        "'model_name_or_path' is 'model' here",
        "'train.lr' is 'train.learning_rate' here",
        "'train.num_train_epochs' is 'train.epochs' here",
    ]
    assert wrong(write(text), "data.max_length=9") == [
        "r.yaml:4: data: 'max_seq_length' and 'max_length' say the same; keep one"
    ]


def test_names_of_optimizers_that_transformers_has_are_understood_with_a_note(write):
    for theirs, taken in (("adamw_torch", "adamw"), ("paged_adamw_32bit", "paged_adamw"), ("lion_32bit", "lion")):
        recipe, notes = load_recipe(write(SMALL), [f"train.optim={theirs}"])
        assert recipe.train.optim == taken
        assert notes[0].startswith(f"'train.optim: {theirs}' is '{taken}' here")
        assert any("Lion's betas" in note for note in notes) == (taken == "lion")


def test_lora_plus_is_for_lora(write):
    assert wrong(write(SMALL), "train.loraplus_lr_ratio=4", "adapter={method: full}") == [
        "override 'train.loraplus_lr_ratio=4': train.loraplus_lr_ratio: LoRA+ is for LoRA's matrices, which 'full' "
        "lacks; remove it"
    ]


def test_a_recipe_written_and_read_again_is_the_same(write):
    recipe, _ = load_recipe(write(SMALL), ["train.learning_rate=1e-7", "data.system='on: [x]'"])
    again, notes = load_recipe(write(recipe.to_yaml()))
    assert again == recipe and notes == []
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_hash_stands_for_all_but_the_output(write):
    recipe, _ = load_recipe(write(SMALL))
    assert re.fullmatch(r"[0-9a-f]{16}", recipe_hash(recipe))
    assert recipe_hash(dataclasses.replace(recipe, output="elsewhere")) == recipe_hash(recipe)
    others = [
        load_recipe(Path("r.yaml"), [change])[0]
        for change in ("model=n", "adapter.r=8", "data.train=b", "objective=pretrain", "train.epochs=2", "seed=1")
    ]
    assert len({recipe_hash(other) for other in [recipe, *others]}) == 7


def test_difference(write):
    old, _ = load_recipe(write(SMALL))
    new, _ = load_recipe(Path("r.yaml"), ["adapter.r=16", "adapter.use_dora=true", "data.train=[a.jsonl, b.jsonl]"])
    assert difference(old, new) == [
        "adapter.r: 4 -> 16",
        "adapter.use_dora: not set -> true",
        'data.train[1].path: not set -> "b.jsonl"',
    ]
    assert difference(new, old)[1] == "adapter.use_dora: true -> not set"
    assert difference(old, old) == []


def test_adapter_config():
    config = adapter_config({"method": "lora", "r": 4, "target_modules": ["q_proj"]})
    assert type(config).__name__ == "LoraConfig"
    assert config.r == 4 and set(config.target_modules) == {"q_proj"}


def test_losses_are_named_and_weighed(write):
    told = "objective: dpo\npreference: {loss_type: [sigmoid, bco_pair], loss_weights: [0.8, 0.2], beta: 0.3}\n"
    recipe, _ = load_recipe(write(SMALL + told))
    assert recipe.preference == PreferenceRecipe(["sigmoid", "bco_pair"], [0.8, 0.2], beta=0.3)
    path = Path("again.yaml")
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path)[0] == recipe
    recipe, notes = load_recipe(write(SMALL + "objective: orpo\n"))
    assert (recipe.objective, recipe.preference) == ("dpo", PreferenceRecipe(["orpo"]))
    assert notes == ["'objective: orpo' is 'dpo' with 'preference.loss_type: orpo' here"]
    recipe, _ = load_recipe(write(SMALL + "objective: kto\npreference: {undesirable_weight: 2.0}\n"))
    assert recipe.preference.undesirable_weight == 2


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("objective: dpo\npreference: {bta: 1}", "r.yaml:7: preference: no field 'bta'; did you mean 'beta'?"),
        ("objective: dpo\nbeta: 1.0", "no field 'beta'; it belongs in 'preference'"),
        ("objective: dpo\npreference: {loss_type: sigmod}", "preference: loss: no 'sigmod'; did you mean 'sigmoid'?"),
        ("objective: dpo\npreference: {simpo_gamma: 1.0}", "preference: loss sigmoid: no option 'gamma'"),
        ("objective: dpo\npreference: {beta: -1.0}", "preference: loss: beta must be above 0"),
        ("objective: dpo\npreference: {loss_weights: [1, 2]}", "loss_weights: 2 weights for 1 losses"),
        ("objective: dpo\npreference: {desirable_weight: 2}", "desirable_weight: has no effect with 'objective: dpo'"),
        ("objective: dpo\npreference: {rpo_alpha: 1, loss_type: [ipo, sft]}", "rpo_alpha: 'sft' is among the losses"),
        ("objective: simpo\npreference: {ref_model: m}", "preference: ref_model: simpo needs no reference"),
        ("objective: orpo\npreference: {loss_type: ipo}", "objective: 'orpo' is DPO with its own loss"),
        ("objective: kto\npreference: {ld_alpha: 0.5}", "preference.ld_alpha: has no effect with 'objective: kto'"),
        ("objective: sft\npreference: {beta: 0.5}", "r.yaml:7: preference.beta: has no effect with 'objective: sft'"),
        ("objective: dpo\ntrain: {fsdp: full_shard}", "r.yaml:7: train.fsdp: the reference of 'dpo' cannot be sharded"),
        ("watch: {max_kl: 1.0}", "r.yaml:6: watch.max_kl: has no effect with 'objective: sft'; remove it"),
        ("objective: dpo\npreference: 3", "r.yaml:7: preference: must be a mapping"),
    ],
)
def test_preferences_that_mean_nothing_are_mistakes(write, section, told):
    assert any(told in line for line in wrong(write(SMALL + section + "\n")))


@pytest.mark.parametrize(
    ("general", "told"),
    [
        ("{shares: 0.1}", "r.yaml:6: general: no field 'shares'; did you mean 'share'?"),
        ("{share: 0.1}", "r.yaml:6: general.share: has no effect without general text; give 'general.data'"),
        ("{eval_size: 9}", "r.yaml:6: general.eval_size: has no effect without general text"),
        ("{data: g.jsonl, share: 1.0}", "r.yaml:6: general.share: must be less than 1, got 1.0"),
        ("{data: g.jsonl, l2: -1}", "r.yaml:6: general.l2: must be greater than or equal to 0, got -1"),
        ("{data: [{path: a, weight: 1}, {path: b}]}", "general.data[1]: has no weight while other files have one"),
        ("{data: [{path: a, colums: {}}]}", "no field 'colums'; did you mean 'columns'?"),
        ("{l2: 0.1}\ntrain: {fsdp: full_shard}", "r.yaml:6: general.l2: what it compares with cannot be sharded"),
        ("{data: g.jsonl}\ntask: seq_cls", "r.yaml:6: general.data: a model of 'task: seq_cls' predicts no text"),
        ("3", "r.yaml:6: general: must be a mapping"),
    ],
)
def test_controls_of_forgetting_that_mean_nothing_are_mistakes(write, general, told):
    found = wrong(write(f"{SMALL}general: {general}\n"))
    assert any(told in line for line in found), found


def test_where_the_base_is_trained_there_is_none_to_compare_with(write):
    found = wrong(write(SMALL + "general: {data: g.jsonl, kl: 0.1}\n"), "adapter={method: full}")
    assert found == [
        "r.yaml:6: general.kl: 'full' trains the base itself, and none is left to compare with; take 'share'"
    ]


def test_controls_of_forgetting_are_off_by_themselves_and_by_zero(write):
    recipe, _ = load_recipe(write(SMALL + "general: {share: 0, ewc: 0, l2: 0.5}\n"))
    assert recipe.general == GeneralRecipe(l2=0.5)
    recipe, _ = load_recipe(write(SMALL + "general: {data: g.jsonl}\n"))
    assert recipe.general == GeneralRecipe([Source("g.jsonl")])


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    for kind in (Recipe, DataRecipe, PreferenceRecipe, WatchRecipe, GeneralRecipe, TrainRecipe, Source):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name}"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_PLACES = [("model",), ("adapter",), ("adapter", "r"), ("adapter", "method"), ("data",), ("data", "train")]
_PLACES += [
    ("data", "eval"),
    ("data", "max_length"),
    ("train",),
    ("train", "epochs"),
    ("train", "report_to"),
    ("seed",),
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(_PLACES), _JSON)
def test_no_value_anywhere_breaks_the_reading(tmp_path_factory, place, value):
    content = yaml.safe_load(SMALL) | {"train": {}}
    into = content
    for step in place[:-1]:
        into = into[step]
    into[place[-1]] = value
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    try:
        recipe, _ = load_recipe(path)
    except RecipeError as error:
        assert str(error).startswith(f"{path}:")
    else:
        assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_right(path):
    if path.name == "flow.yaml":
        assert load_flow(path)
    else:
        assert load_recipe(path)[1] == []
