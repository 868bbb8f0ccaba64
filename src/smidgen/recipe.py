"""The recipe: one YAML file that says which model is trained how, on what.

`load_recipe` reads a file, reports every mistake in it at once with its line, and answers plain dataclasses.
Relative paths in a recipe are relative to the working directory. Nothing here needs torch, except that checking the
`adapter` part imports the method that it names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from smidgen import llamafactory
from smidgen.checking import build, check
from smidgen.contradictions import contradictions
from smidgen.drafts import Draft, Place, dotted, read_draft
from smidgen.errors import UsageError, did_you_mean
from smidgen.recipe_parts import (
    FORBID,
    REWARDS,
    DataRecipe,
    GeneralRecipe,
    PreferenceRecipe,
    RewardRecipe,
    Source,
    TrainRecipe,
    WatchRecipe,
)
from smidgen.registry import METHODS, PREFERENCE_LOSS, lookup


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    model: a hub id, a local folder, a GGUF file or a built-in name.
    quantize: store the linear layers of the base in 4 or 8 bits, made dense where they are used (QLoRA).
    double_quantization: store the scales of 4-bit weights in 8 bits too.
    adapter: `method`, a name in `smidgen.registry.METHODS`, and the fields of that method's config.
    task: what the model is made to do; the others than language modelling learn from rows with labels.
    output: the run folder.
    """

    model: Annotated[str, Field(min_length=1)]
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = True
    adapter: dict[str, Any]
    data: DataRecipe
    task: Literal["causal_lm", "seq_2_seq_lm", "seq_cls", "token_cls", "question_ans"] = "causal_lm"
    objective: Literal["sft", "pretrain", "dpo", "kto", "reward", "process_reward"] = "sft"
    preference: PreferenceRecipe = field(default_factory=PreferenceRecipe)
    reward: RewardRecipe = field(default_factory=RewardRecipe)
    watch: WatchRecipe = field(default_factory=WatchRecipe)
    general: GeneralRecipe = field(default_factory=GeneralRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    output: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    __pydantic_config__ = FORBID

    @property
    def model_task(self) -> str:
        """The task of the model that is trained: a reward model is a classifier of one class."""
        return "seq_cls" if self.objective in REWARDS else self.task

    def to_dict(self) -> dict[str, Any]:
        """Answer the recipe as plain mappings, lists and values, with every default written out."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Answer the recipe as YAML that `load_recipe` reads back as an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


# Spellings of other tools that mean exactly the same. A spelling whose meaning differs is in _ADVICE.
_SPELLINGS: dict[str, dict[str, str]] = {
    "": {"model_name_or_path": "model", "base_model": "model", "output_dir": "output"},
    "adapter": {
        "lora_r": "r",
        "lora_rank": "r",
        "lora_target_modules": "target_modules",
    },
    "data": {
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
        "sequence_len": "max_length",
        "cutoff_len": "max_length",
        "val_size": "eval_size",
        "max_samples": "limit",
    },
    "train": {
        "num_train_epochs": "epochs",
        "num_epochs": "epochs",
        "lr": "learning_rate",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "max_norm": "max_grad_norm",
    },
}

# Objectives that are DPO with another loss.
_OF_DPO = ("ipo", "cpo", "simpo", "orpo")

# transformers' names for optimizers, and what is taken.
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "lion_32bit": "lion",
    "paged_lion_32bit": "paged_lion",
}

_ADVICE = {
    "per_device_train_batch_size": "'batch_size' counts rows per update: "
    "per_device_train_batch_size x gradient_accumulation_steps x devices",
    "gradient_accumulation_steps": "'batch_size' counts rows per update; micro-batches are cut by 'micro_batch_tokens'",
    "bf16": "write 'dtype: bfloat16' in 'train'",
    "fp16": "write 'dtype: float16' in 'train'",
    "warmup_steps": "write 'warmup_ratio', a share of all updates",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """Read a recipe, smidgen's own or LLaMA-Factory's.

    Args:
        path: the YAML file.
        overrides: ``key.path=value`` texts; the value is read as YAML.

    Returns:
        The recipe, and notes for the user: old spellings that were understood, what was translated.

    Raises:
        smidgen.errors.RecipeError: with a line for every mistake, each naming file, line and field.
    """
    draft = read_draft(Path(path))
    if llamafactory.is_llamafactory(draft.data):
        _translate(draft)
    for text in overrides:
        draft.override(text)
    _rename_spellings(draft)
    _rename_optimizer(draft)
    _unfold(draft.data)
    _rename_objective(draft)
    recipe = check(draft, Recipe, draft.data, (), _unknown)
    if isinstance(adapter := draft.data.get("adapter"), dict):
        _check_adapter(draft, adapter)
    if recipe and recipe.objective == "dpo":
        for problem in PREFERENCE_LOSS.load()(recipe.preference):
            draft.problem(("preference",), f"preference: {problem}")
    for place, message in contradictions(draft.data):
        draft.problem(place, f"{dotted(place)}: {message}")
    draft.raise_problems()
    return recipe, draft.notes


def adapter_config(adapter: Mapping[str, Any]) -> Any:
    """Answer the config object, such as a `LoraConfig`, that the `adapter` part of a checked recipe describes."""
    config_class = lookup(METHODS, adapter["method"], "adapter").load().config_class
    return build(config_class, _without_method(adapter))


def recipe_hash(recipe: Recipe) -> str:
    """Answer 16 hexadecimal digits that stand for all of the recipe but the place of its output."""
    content = recipe.to_dict()
    del content["output"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def difference(old: Recipe, new: Recipe) -> list[str]:
    """Answer a line for each value that differs: ``adapter.r: 8 -> 16``."""
    before, after = dict(flat(old)), dict(flat(new))
    lines = []
    for place in [*before, *(place for place in after if place not in before)]:
        if before.get(place) != after.get(place):
            told = [json.dumps(side[place]) if place in side else "not set" for side in (before, after)]
            lines.append(f"{place}: {told[0]} -> {told[1]}")
    return lines


def flat(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield each value of a recipe with its place: ``data.train[0].path``."""
    yield from ((dotted(place), value) for place, value in _flat(recipe.to_dict()))


def _flat(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(item, (*place, key))
    else:
        yield place, value


# ---- reading ----


def _translate(draft: Draft) -> None:
    """Replace a LLaMA-Factory recipe by its translation; positions keep pointing into the file."""
    translation = llamafactory.translate(draft.data)
    lines = draft.lines
    for key, message in translation.problems:
        draft.problem((key,), message)
    draft.data = translation.data
    draft.lines = {place: lines[(key,)] for place, key in translation.origins.items() if (key,) in lines}
    draft.notes += translation.notes


def _rename_spellings(draft: Draft) -> None:
    for section, spellings in _SPELLINGS.items():
        fields = draft.data.get(section) if section else draft.data
        if not isinstance(fields, dict):
            continue
        above: Place = (section,) if section else ()
        for old in [key for key in fields if key in spellings]:
            new = spellings[old]
            if new in fields:
                draft.problem((*above, old), f"{section or 'recipe'}: '{old}' and '{new}' say the same; keep one")
                del fields[old]
                continue
            fields[new] = fields.pop(old)
            draft.move((*above, old), (*above, new))
            draft.notes.append(f"'{dotted((*above, old))}' is '{dotted((*above, new))}' here")


def _rename_optimizer(draft: Draft) -> None:
    train = draft.data.get("train")
    name = train.get("optim") if isinstance(train, dict) else None
    if not isinstance(name, str):
        return
    if name in _OPTIMIZERS:
        draft.data["train"]["optim"] = taken = _OPTIMIZERS[name]
        fused = ", PyTorch's fused AdamW" if taken == "adamw" else ""
        draft.notes.append(f"'train.optim: {name}' is '{taken}' here{fused}")
    if "lion" in name:
        draft.notes.append("Lion's betas are the paper's: 0.9 and 0.99; transformers' Trainer gives it 0.9 and 0.999")


def _rename_objective(draft: Draft) -> None:
    name = draft.data.get("objective")
    if name not in _OF_DPO or not isinstance(section := draft.data.setdefault("preference", {}), dict):
        return
    if section.setdefault("loss_type", [name]) != [name]:
        draft.problem(("objective",), f"objective: '{name}' is DPO with its own loss; leave out 'preference.loss_type'")
    draft.data["objective"] = "dpo"
    draft.notes.append(f"'objective: {name}' is 'dpo' with 'preference.loss_type: {name}' here")


def _unfold(data: dict[str, Any]) -> None:
    """Write out what a recipe may say briefly: ``train: a.jsonl``, ``report_to: tensorboard``."""
    train = data.get("train")
    for section, key in (("data", "train"), ("data", "eval"), ("general", "data")):
        if isinstance(rows := data.get(section), dict) and key in rows:
            sources = [rows[key]] if isinstance(rows[key], str | dict) else rows[key]
            if isinstance(sources, list):
                rows[key] = [{"path": source} if isinstance(source, str) else source for source in sources]
    if isinstance(train, dict) and isinstance(names := train.get("report_to"), str):
        train["report_to"] = [] if names == "none" else [names]
    for key, kind in (("loss_type", str), ("loss_weights", int | float)):
        if isinstance(section := data.get("preference"), dict) and isinstance(section.get(key), kind):
            section[key] = [section[key]]


# ---- checking ----


def _check_adapter(draft: Draft, adapter: dict[str, Any]) -> None:
    method = adapter.get("method")
    if not isinstance(method, str):
        draft.problem(("adapter", "method"), f"adapter: 'method' must be one of: {', '.join(METHODS)}")
        return
    try:
        config_class = lookup(METHODS, method, "adapter.method").load().config_class
    except UsageError as error:
        draft.problem(("adapter", "method"), str(error))
        return
    known = [known.name for known in dataclasses.fields(config_class) if known.init]
    fields = _without_method(adapter)
    for name in [name for name in fields if name not in known]:
        draft.problem(("adapter", name), f"adapter: {_no_field(name, known)}")
        del fields[name]
    check(draft, config_class, fields, ("adapter",), _unknown)


def _without_method(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in adapter.items() if name != "method"}


_SECTIONS: dict[str, type] = {
    "": Recipe,
    "data": DataRecipe,
    "preference": PreferenceRecipe,
    "reward": RewardRecipe,
    "watch": WatchRecipe,
    "general": GeneralRecipe,
    "train": TrainRecipe,
    "data.train": Source,
    "data.eval": Source,
    "general.data": Source,
}


def _unknown(place: Place, name: str) -> str:
    section = dotted(tuple(step for step in place if isinstance(step, str)))
    return _no_field(name, _names(_SECTIONS[section]))


def _no_field(name: str, known: Sequence[str]) -> str:
    """Answer what to say about a field that is not in `known`: what to write, its spelling, or where it belongs."""
    if name in _ADVICE:
        return f"no field '{name}'; {_ADVICE[name]}"
    if near := did_you_mean(name, known):
        return f"no field '{name}'{near}"
    for section in ("data", "train", "preference", "reward", "watch", "", "general"):
        if name in _names(_SECTIONS[section]):
            home = f"in '{section}'" if section else "at the top of the recipe"
            return f"no field '{name}'; it belongs {home}"
    return f"no field '{name}'; there are: {', '.join(known)}"


def _names(kind: type) -> list[str]:
    return [known.name for known in dataclasses.fields(kind)]
