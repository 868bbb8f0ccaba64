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
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import ConfigDict, Field

from smidgen import llamafactory
from smidgen.checking import build, check
from smidgen.drafts import Draft, Place, dotted, read_draft
from smidgen.errors import UsageError, did_you_mean
from smidgen.registry import METHODS, lookup

Positive: TypeAlias = Annotated[int, Field(ge=1)]
Share: TypeAlias = Annotated[float, Field(gt=0, lt=1)]

# An optimizer's name says its rule, whether states are in 8 bits, and whether they are paged.
Optimizer: TypeAlias = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion",
    "paged_lion_8bit",
    "adafactor",
]

_FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Source:
    """One data file, or a folder of them.

    path: the file.
    weight: its share of the tokens in a mixture; all sources have one, or none has.
    columns: what the file calls the columns, where it does not use the usual names: ``{instruction: question}``.
        Where it is given, no other column is read.
    """

    path: str
    weight: Annotated[float, Field(gt=0)] | None = None
    columns: dict[str, str] | None = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True)
class DataRecipe:
    """What is learned from, and how it becomes tokens.

    train, eval: the files; eval may be left out.
    eval_size: how much of train is held out when `eval` is not given: a share below 1, or a number of rows.
    max_length: the most tokens of one row.
    format: the name of the data format; None: detected.
    template: path of a Jinja chat template; None: the tokenizer's own.
    system: the system message of chats that have none.
    on_long: what happens to a row longer than `max_length`.
    packing: whether several rows share one sequence; None: chosen, and said.
    train_on: whether the loss counts the completion alone or every token.
    limit: only the first n rows of each file.
    add_tokens, add_special_tokens: new tokens; only their rows of the embedding are trained, beside the adapter.
        Special ones are left out of decoded answers.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    eval: Annotated[list[Source], Field(min_length=1)] | None = None
    eval_size: Positive | Share | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    format: str | None = None
    template: str | None = None
    system: str | None = None
    on_long: Literal["drop", "truncate", "truncate_prompt", "error"] = "truncate_prompt"
    packing: bool | None = None
    train_on: Literal["completion", "all"] = "completion"
    limit: Positive | None = None
    add_tokens: list[Annotated[str, Field(min_length=1)]] | None = None
    add_special_tokens: list[Annotated[str, Field(min_length=1)]] | None = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True)
class TrainRecipe:
    """How the parameters are moved.

    batch_size: rows per update, however they are cut into micro-batches and spread over processes.
    micro_batch_tokens: the most tokens computed at once; None: chosen from the memory there is.
    max_steps: the number of updates; it takes precedence over `epochs`.
    loraplus_lr_ratio: LoRA+: how many times the learning rate B matrices and vectors learn at; None: as the others.
    loraplus_lr_embedding: with LoRA+, the learning rate of LoRA on embeddings.
    warmup_ratio: the share of the updates in which the learning rate rises.
    eval_steps: updates between two evaluations; None: at the end only.
    save_steps: updates between two checkpoints; None: only when the run is stopped (what was learned is saved anyway).
    save_total_limit: how many checkpoints are kept; None: all.
    report_to: names of trackers: tensorboard, wandb, mlflow, trackio...
    fsdp: "full_shard": parameters, gradients and optimizer states are spread over the processes.
    """

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    batch_size: Positive = 16
    micro_batch_tokens: Positive | None = None
    optim: Optimizer = "adamw"
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] = 1e-6
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.03
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    logging_steps: Positive = 10
    eval_steps: Positive | None = None
    save_steps: Positive | None = None
    save_total_limit: Positive | None = None
    report_to: list[str] = field(default_factory=list)
    fsdp: Literal["full_shard"] | None = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run.

    model: a hub id, a local folder, a GGUF file or a built-in name.
    quantize: store the linear layers of the base in 4 or 8 bits, made dense where they are used (QLoRA).
    double_quantization: store the scales of 4-bit weights in 8 bits too.
    adapter: `method`, a name in `smidgen.registry.METHODS`, and the fields of that method's config.
    output: the run folder.
    """

    model: Annotated[str, Field(min_length=1)]
    quantize: Literal["nf4", "fp4", "int8"] | None = None
    double_quantization: bool = True
    adapter: dict[str, Any]
    data: DataRecipe
    objective: Literal["sft", "pretrain"] = "sft"
    train: TrainRecipe = field(default_factory=TrainRecipe)
    output: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    __pydantic_config__ = _FORBID

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
    recipe = check(draft, Recipe, draft.data, (), _unknown)
    if isinstance(adapter := draft.data.get("adapter"), dict):
        _check_adapter(draft, adapter)
    for place, message in _contradictions(draft.data):
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
    before, after = dict(_flat(old.to_dict())), dict(_flat(new.to_dict()))
    lines = []
    for place in [*before, *(place for place in after if place not in before)]:
        if before.get(place) != after.get(place):
            told = [json.dumps(side[place]) if place in side else "not set" for side in (before, after)]
            lines.append(f"{dotted(place)}: {told[0]} -> {told[1]}")
    return lines


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


def _unfold(data: dict[str, Any]) -> None:
    """Write out what a recipe may say briefly: ``train: a.jsonl``, ``report_to: tensorboard``."""
    rows, train = data.get("data"), data.get("train")
    if isinstance(rows, dict):
        for key in rows.keys() & {"train", "eval"}:
            sources = [rows[key]] if isinstance(rows[key], str | dict) else rows[key]
            if isinstance(sources, list):
                rows[key] = [{"path": source} if isinstance(source, str) else source for source in sources]
    if isinstance(train, dict) and isinstance(names := train.get("report_to"), str):
        train["report_to"] = [] if names == "none" else [names]


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
    "train": TrainRecipe,
    "data.train": Source,
    "data.eval": Source,
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
    for section in ("data", "train", ""):
        if name in _names(_SECTIONS[section]):
            home = f"in '{section}'" if section else "at the top of the recipe"
            return f"no field '{name}'; it belongs {home}"
    return f"no field '{name}'; there are: {', '.join(known)}"


def _names(kind: type) -> list[str]:
    return [known.name for known in dataclasses.fields(kind)]


def _contradictions(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yield what is wrong between fields that are each fine. Sections of a wrong type are passed over."""
    rows, train = (section if isinstance(section := data.get(name), dict) else {} for name in ("data", "train"))
    if rows.get("eval") is not None and rows.get("eval_size") is not None:
        yield ("data", "eval_size"), "'eval' names the held-out rows already; keep one of the two"
    if train.get("eval_steps") is not None and rows.get("eval") is None and rows.get("eval_size") is None:
        yield ("train", "eval_steps"), "there are no held-out rows; give 'data.eval' or 'data.eval_size'"
    if train.get("save_total_limit") is not None and train.get("save_steps") is None:
        yield ("train", "save_total_limit"), "no checkpoints are written on the way; give 'train.save_steps'"
    if train.get("fsdp") is not None and train.get("dtype") == "float16":
        yield ("train", "fsdp"), "float16 needs scaled losses, which sharded gradients lack; take 'dtype: bfloat16'"
    method = data["adapter"].get("method") if isinstance(data.get("adapter"), dict) else None
    if data.get("quantize") is not None and method in ("full", "freeze"):
        yield ("quantize",), f"'{method}' trains the weights themselves, which 4 and 8 bits cannot hold; take 'lora'"
    if data.get("quantize") is not None and train.get("fsdp") is not None:
        yield ("quantize",), "stored weights cannot be sharded; leave out 'train.fsdp', or load in 16 bits"
    if train.get("fsdp") is not None and train.get("optim", "adamw") != "adamw":
        yield ("train", "optim"), "'fsdp' spreads the states of adamw alone; take 'optim: adamw', or leave out 'fsdp'"
    if train.get("loraplus_lr_ratio") is not None and method in ("full", "freeze"):
        yield ("train", "loraplus_lr_ratio"), f"LoRA+ is for LoRA's matrices, which '{method}' lacks; remove it"
    for key in ("train", "eval"):
        sources = rows.get(key)
        sources = sources if isinstance(sources, list) else []
        weighed = [isinstance(source, dict) and source.get("weight") is not None for source in sources]
        if any(weighed) and not all(weighed):
            yield ("data", key, weighed.index(False)), "has no weight while other files have one; give each a weight"
    if data.get("objective") == "pretrain":
        for name in ("system", "template"):
            if rows.get(name) is not None:
                yield ("data", name), "has no effect with 'objective: pretrain', which reads plain text; remove it"
