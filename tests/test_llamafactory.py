from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from smidgen.errors import RecipeError
from smidgen.llamafactory import is_llamafactory, translate
from smidgen.llamafactory_keys import NO_EFFECT, NO_EFFECT_PREFIXES, REFUSED, SAME
from smidgen.recipe import DataRecipe, PreferenceRecipe, Recipe, Source, TrainRecipe, load_recipe

FULL = """\
### model
model_name_or_path: org/some-model
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: q_proj, v_proj

### dataset
dataset: first,second
dataset_dir: sets
template: llama3
cutoff_len: 512
max_samples: 100
overwrite_cache: true
preprocessing_num_workers: 16

### output
output_dir: saves/run
logging_steps: 5
save_steps: 50
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 2.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null

### eval
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 25
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a LLaMA-Factory recipe made of lines, beside a folder of data sets."""
    monkeypatch.chdir(tmp_path)
    sets = tmp_path / "sets"
    sets.mkdir()
    listing = {
        "first": {"file_name": "a.json"},
        "second": {
            "file_name": "b.json",
            "columns": {"prompt": "question", "response": "answer", "history": "earlier"},
        },
        "chats": {
            "file_name": "c.json",
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "odd": {"file_name": "c.json", "formatting": "sharegpt", "tags": {"user_tag": "asker"}},
        "pairs": {"file_name": "d.json", "ranking": True},
        "far": {"hf_hub_url": "someone/something"},
        "few": {"file_name": "a.json", "num_samples": 10},
    }
    (sets / "dataset_info.json").write_text(json.dumps(listing), encoding="utf-8")
    (sets / "plain.jsonl").touch()

    def load(text: str, *overrides: str) -> tuple[Recipe, list[str]]:
        Path("lf.yaml").write_text(text, encoding="utf-8")
        return load_recipe("lf.yaml", overrides)

    return load


def small(**keys: object) -> str:
    base: dict[str, object] = {"model_name_or_path": "m", "finetuning_type": "lora", "output_dir": "o"}
    return yaml.safe_dump(base | {"dataset": "first", "dataset_dir": "sets"} | keys, sort_keys=False)


def wrong(load, **keys: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(small(**keys))
    return str(caught.value).splitlines()


def test_a_whole_file_is_translated(load):
    recipe, notes = load(FULL)
    adapter = {"method": "lora", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    assert recipe == Recipe(
        model="org/some-model",
        adapter=adapter | {"target_modules": ["q_proj", "v_proj"]},
        data=DataRecipe(
            train=[
                Source(str(Path("sets/a.json"))),
                Source(
                    str(Path("sets/b.json")),
                    columns={"instruction": "question", "output": "answer", "history": "earlier"},
                ),
            ],
            eval_size=0.1,
            max_length=512,
            limit=100,
            packing=False,
        ),
        train=TrainRecipe(
            epochs=2,
            learning_rate=1e-4,
            batch_size=16,
            lr_scheduler_type="cosine",
            warmup_ratio=0.1,
            dtype="bfloat16",
            gradient_checkpointing=True,
            logging_steps=5,
            eval_steps=25,
            save_steps=50,
        ),
        output="saves/run",
    )
    for key in yaml.safe_load(FULL):
        assert any(note.startswith(f"{key}:") or f", {key}:" in note for note in notes), key


def test_the_notes_say_what_became_of_each_key(load):
    _, notes = load(FULL)
    assert "lora_rank: 16 -> adapter.r: 16" in notes
    assert "lora_alpha: left out -> adapter.lora_alpha: 32" in notes
    assert "per_device_train_batch_size: 2, gradient_accumulation_steps: 8 -> train.batch_size: 16" in notes
    assert "plot_loss: true has no effect: report.html always shows the loss" in notes
    assert any(note.startswith("template: llama3 has no effect: the tokenizer's own chat template") for note in notes)


def test_what_is_left_out_has_llamafactory_s_defaults(load):
    recipe, _ = load(small())
    assert recipe.adapter == {
        "method": "lora",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    assert recipe.data.max_length == 2048
    assert recipe.train == TrainRecipe(
        epochs=3,
        learning_rate=5e-5,
        batch_size=8,
        lr_scheduler_type="linear",
        warmup_ratio=0,
        gradient_checkpointing=True,
        logging_steps=500,
        save_steps=500,
    )


@pytest.mark.parametrize(
    ("keys", "place", "value"),
    [
        ({"stage": "pt"}, ("objective",), "pretrain"),
        ({"stage": "pt"}, ("data", "packing"), True),
        ({"finetuning_type": "full"}, ("adapter",), {"method": "full"}),
        (
            {"finetuning_type": "freeze", "freeze_trainable_layers": 3},
            ("adapter",),
            {"method": "freeze", "num_layers": 3},
        ),
        ({"lora_alpha": 5}, ("adapter", "lora_alpha"), 5),
        ({"use_dora": True}, ("adapter", "use_dora"), True),
        ({"additional_target": "lm_head,embed_tokens"}, ("adapter", "modules_to_save"), ["lm_head", "embed_tokens"]),
        ({"pissa_init": True, "pissa_iter": -1}, ("adapter", "init_lora_weights"), "pissa"),
        ({"max_steps": 40}, ("train", "max_steps"), 40),
        ({"max_steps": -1}, ("train", "max_steps"), None),
        ({"max_steps": 40, "warmup_steps": 10}, ("train", "warmup_ratio"), 0.25),
        ({"warmup_steps": 0.2}, ("train", "warmup_ratio"), 0.2),
        ({"fp16": True}, ("train", "dtype"), "float16"),
        ({"disable_gradient_checkpointing": True}, ("train", "gradient_checkpointing"), False),
        ({"report_to": ["wandb", "none"]}, ("train", "report_to"), ["wandb"]),
        ({"save_strategy": "no", "save_total_limit": 3}, ("train", "save_steps"), None),
        ({"val_size": 20}, ("data", "eval_size"), 20),
        ({"val_size": 0.0}, ("data", "eval_size"), None),
        (
            {"eval_dataset": "plain"},
            ("data", "eval"),
            [{"path": str(Path("sets/plain.jsonl")), "weight": None, "columns": None}],
        ),
        ({"train_on_prompt": True}, ("data", "train_on"), "all"),
        ({"neat_packing": True}, ("data", "packing"), True),
        ({"default_system": "Be brief."}, ("data", "system"), "Be brief."),
        ({"dataset": "chats"}, ("data", "train", 0, "columns"), {"conversations": "turns"}),
        ({"optim": "paged_adamw_32bit"}, ("train", "optim"), "paged_adamw"),
        ({"optim": "adamw_torch"}, ("train", "optim"), "adamw"),
        ({"loraplus_lr_ratio": 16}, ("train", "loraplus_lr_ratio"), 16),
        ({"quantization_bit": None}, ("model",), "m"),
        ({"quantization_bit": 4}, ("quantize",), "nf4"),
        ({"quantization_bit": 8}, ("quantize",), "int8"),
        ({"quantization_bit": 4, "quantization_type": "fp4"}, ("quantize",), "fp4"),
        ({"quantization_bit": 4, "double_quantization": False}, ("double_quantization",), False),
        ({"finetuning_type": "qlora"}, ("quantize",), "nf4"),
    ],
    ids=str,
)
def test_a_key_is_translated(load, keys, place, value):
    recipe, notes = load(small(**keys))
    for key in keys:
        assert any(f"{key}: " in note for note in notes), key
    found = recipe.to_dict()
    for step in place:
        found = found[step]
    assert found == value


def test_stages_of_preferences_are_translated(load):
    keys = {"dataset": "pairs", "pref_beta": 0.2, "pref_ftx": 0.5, "dpo_label_smoothing": 0.1, "ref_model": "other"}
    recipe, notes = load(small(stage="dpo", **keys))
    wanted = {"beta": 0.2, "rpo_alpha": 0.5, "label_smoothing": 0.1, "ref_model": "other"}
    assert (recipe.objective, recipe.preference) == ("dpo", PreferenceRecipe(**wanted))
    assert "pref_ftx: 0.5 -> preference.rpo_alpha: 0.5" in notes
    recipe, _ = load(small(stage="dpo", dataset="pairs", pref_loss="simpo", pref_beta=2.0))
    assert recipe.preference == PreferenceRecipe(loss_type=["simpo"], simpo_gamma=0.5, beta=2.0)
    recipe, _ = load(small(stage="rm", dataset="pairs", pref_beta=0.3))
    assert (recipe.objective, recipe.preference) == ("reward", PreferenceRecipe())
    recipe, _ = load(small(stage="kto", kto_rejected_weight=1.5))
    assert (recipe.objective, recipe.preference) == ("kto", PreferenceRecipe(beta=0.1, undesirable_weight=1.5))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"quantization_bit": 3}, "lf.yaml:6: quantization_bit: 3 by 'bnb' is not there; there are 4 and 8"),
        ({"finetuning_type": "dora"}, "lf.yaml:2: finetuning_type: 'dora' is not there; there are: lora, qlora"),
        ({"stage": "ppo"}, "lf.yaml:6: stage: 'ppo' is not there yet; there are: sft, pt, dpo, kto, rm"),
        ({"stage": "dpo"}, "lf.yaml:4: dataset: 'first' holds no preference pairs"),
        ({"stage": "dpo", "pref_loss": "kto_pair"}, "pref_loss: 'kto_pair' is not there; there are: sigmoid"),
        ({"stage": "dpo", "pref_bco_weight": 0.5}, "pref_bco_weight: is not there"),
        ({"lora_rnk": 4}, "lf.yaml:6: lora_rnk: LLaMA-Factory has no such key; did you mean 'lora_rank'?"),
        ({"lora_rank": "a"}, "lf.yaml:6: adapter.r: must be a whole number"),
        ({"learning_rate": -1}, "lf.yaml:6: train.learning_rate: must be greater than 0"),
        ({"lr_scheduler_type": "polynomial"}, "lf.yaml:6: train.lr_scheduler_type: must be"),
        ({"per_device_train_batch_size": "auto"}, "lf.yaml:6: per_device_train_batch_size: must be a whole number"),
        ({"warmup_steps": 100}, "lf.yaml:6: warmup_steps: 100: write 'warmup_ratio'"),
        ({"mask_history": True}, "lf.yaml:6: mask_history: true cannot be honoured"),
        ({"optim": "galore_adamw"}, "lf.yaml:6: train.optim: must be 'adamw', 'adamw_8bit'"),
        ({"use_galore": True}, "lf.yaml:6: use_galore: true cannot be honoured"),
        ({"do_train": False}, "lf.yaml:6: do_train: false asks for no training"),
        ({"resume_from_checkpoint": "saves/x"}, "use 'smidgen train FILE --resume'"),
        ({"dataset": "firts"}, "lf.yaml:4: dataset: 'firts' is neither in"),
        ({"dataset": "firts"}, "did you mean 'first'?"),
        ({"dataset": "pairs"}, "lf.yaml:4: dataset: 'pairs' holds preference pairs"),
        ({"dataset": "far"}, "lf.yaml:4: dataset: 'far' is not a local file"),
        ({"dataset": "few"}, "num_samples cannot be honoured; use 'max_samples'"),
        ({"dataset": "odd"}, "user_tag: 'asker' is not read; it may be human or user"),
        ({"dataset": None}, "dataset: is missing"),
        ({"dataset_dir": "ONLINE"}, "lf.yaml:5: dataset_dir: must be a local folder"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_a_mistake(load, keys, told):
    lines = wrong(load, **keys)
    assert any(told in line for line in lines), lines


@pytest.mark.parametrize(("key", "off"), [(key, value) for key, (off, _) in REFUSED.items() for value in off], ids=str)
def test_a_switch_that_is_off_is_fine(load, key, off):
    recipe, notes = load(small(**{key: off}))
    if key != "freeze_trainable_modules":  # which does not matter to lora in any case
        assert any(note.startswith(f"{key}: ") for note in notes)
    assert recipe == load(small())[0]


@pytest.mark.parametrize("key", [*NO_EFFECT, "galore_rank", "ddp_find_unused_parameters", "vllm_maxlen"])
def test_a_key_without_effect_has_a_note_with_the_reason(load, key):
    recipe, notes = load(small(**{key: True}))
    assert [note for note in notes if note.startswith(f"{key}: true has no effect: ")]
    assert recipe == load(small())[0]


def test_every_key_is_judged_in_one_place_only():
    assert not SAME.keys() & NO_EFFECT.keys()
    assert not (SAME.keys() | NO_EFFECT.keys()) & REFUSED.keys()
    assert not [key for key in NO_EFFECT_PREFIXES if key in REFUSED]


def test_several_mistakes_are_told_at_once(load):
    lines = wrong(load, quantization_bit=3, lora_rnk=3, learning_rate=0)
    assert [line.split(":")[1] for line in lines] == ["6", "7", "8"]


def test_overrides_name_fields_of_the_recipe(load):
    recipe, _ = load(small(), "train.max_steps=3", "adapter.r=2")
    assert recipe.train.max_steps == 3 and recipe.adapter["r"] == 2


def test_a_folder_without_dataset_info(load):
    Path("sets/dataset_info.json").unlink()
    assert load(small(dataset="plain"))[0].data.train == [Source(str(Path("sets/plain.jsonl")))]
    Path("sets/dataset_info.json").write_text("{", encoding="utf-8")
    assert "not valid JSON" in wrong(load)[0]


def test_what_is_taken_for_llamafactory():
    assert is_llamafactory({"model_name_or_path": "m", "stage": "sft", "dataset": "x"})
    assert not is_llamafactory({"model": "m", "adapter": {}, "data": {}, "output": "o"})
    assert not is_llamafactory({"model_name_or_path": "m", "adapter": {}, "data": {}, "template": "x", "dataset": "y"})


def test_nothing_of_the_configuration_is_changed():
    config = {"model_name_or_path": "m", "finetuning_type": "lora", "dataset": "x", "lora_rank": 4}
    before = dict(config)
    translate(config)
    assert config == before
