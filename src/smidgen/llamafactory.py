"""LLaMA-Factory's YAML for fine-tuning, pretraining, DPO, KTO and reward models, translated to smidgen's recipe.

Every key is either translated, or has no effect on what is learned (and a note says why), or changes what is learned
and cannot be honoured: then it is a mistake, unless it is switched off. Keys that the file leaves out get
LLaMA-Factory's defaults, not smidgen's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smidgen.drafts import Place, dotted
from smidgen.errors import RecipeError, did_you_mean
from smidgen.foreign import read_object
from smidgen.llamafactory_keys import NO_EFFECT, NO_EFFECT_PREFIXES, REFUSED, SAME

_MARKS = {"finetuning_type", "stage", "lora_rank", "lora_target", "dataset", "dataset_dir", "cutoff_len", "template"}


@dataclass
class Translation:
    """The recipe's plain data; from which key each place came; notes for the user; mistakes, each with its key."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def is_llamafactory(data: Mapping[str, Any]) -> bool:
    """Say whether a recipe is LLaMA-Factory's, by its keys."""
    return len(_MARKS & data.keys()) >= 2 and not {"adapter", "data"} & data.keys()


def translate(config: Mapping[str, Any]) -> Translation:
    """Translate a LLaMA-Factory configuration; `dataset_info.json` is read from its `dataset_dir`."""
    translator = _Translator(config)
    for part in _PARTS:
        part(translator)
    translator.rest()
    return translator.result


class _Translator:
    """Takes keys out of the configuration one by one, and writes down what became of each."""

    def __init__(self, config: Mapping[str, Any]):
        self.left = dict(config)
        self.result = Translation()
        self.given = config
        self.told: set[str] = set()  # the keys that a note or a mistake speaks of

    def take(self, key: str, default: Any = None) -> Any:
        """Answer the value of `key`, or the default where the file leaves it out or says null."""
        value = self.left.pop(key, None)
        return default if value is None else value

    def put(self, place: Place, value: Any, *keys: str) -> None:
        """Set a value of the recipe that comes from `keys`, and note it."""
        into: Any = self.result.data
        for step in place[:-1]:
            into = into.setdefault(step, {})
        into[place[-1]] = value
        given = [key for key in keys if self.given.get(key) is not None]
        self.told |= {*given}
        if given:
            self.result.origins[place] = given[0]
        told = ", ".join(f"{key}: {_json(self.given[key])}" for key in given) or f"{keys[0]}: left out"
        self.result.notes.append(f"{told} -> {dotted(place)}: {_json(value)}")

    def note(self, key: str, why: str) -> None:
        self.told.add(key)
        self.result.notes.append(f"{key}: {_json(self.given[key])} has no effect: {why}")

    def problem(self, key: str, message: str) -> None:
        self.told.add(key)
        self.result.problems.append((key, f"{key}: {message}"))

    def rest(self) -> None:
        """Judge the keys that no part has taken."""
        known = {*self.given.keys() - self.left.keys(), *SAME, *NO_EFFECT, *REFUSED, *_MARKS}
        for key, value in self.left.items():
            off, why = REFUSED.get(key, ((), ""))
            if key in REFUSED and value is not None and value not in off:
                self.problem(key, f"{_json(value)} cannot be honoured: {why}")
            elif key in REFUSED:
                continue
            elif key in NO_EFFECT:
                self.note(key, NO_EFFECT[key])
            elif key.startswith(NO_EFFECT_PREFIXES):
                self.note(key, "it does not matter to this training")
            else:
                self.problem(key, f"LLaMA-Factory has no such key{did_you_mean(key, known)}")
        for key in [key for key in self.given if key not in self.told]:
            self.note(key, "it asks for what is done anyway")


def _same(config: _Translator) -> None:
    for key, (place, default) in SAME.items():
        value = config.take(key, default)
        if value is not None:
            config.put(place, value, key)


def _stage(config: _Translator) -> None:
    stage = config.take("stage", "sft")
    if stage not in ("sft", "pt", "dpo", "kto", "rm"):
        config.problem("stage", f"'{stage}' is not there yet; there are: sft, pt, dpo, kto, rm")
    config.put(("objective",), {"pt": "pretrain", "rm": "reward"}.get(stage, stage), "stage")
    if stage in ("dpo", "kto"):
        _preference(config, stage)
    if config.take("template"):
        why = "the tokenizer's own chat template is used" if stage != "pt" else "pretraining reads plain text"
        config.note("template", f"{why}; another one can be given as 'data.template=FILE.jinja'")
    if config.given.get("do_train") is False:
        config.problem("do_train", "false asks for no training; use 'smidgen evaluate' to predict")


def _preference(config: _Translator, stage: str) -> None:
    config.put(("preference", "beta"), config.take("pref_beta", 0.1), "pref_beta")
    names = {"dpo": ("dpo_label_smoothing",), "kto": ("kto_chosen_weight", "kto_rejected_weight")}[stage]
    loss = config.take("pref_loss", "sigmoid")
    if stage == "dpo":
        if loss not in ("sigmoid", "hinge", "ipo", "orpo", "simpo"):
            config.problem("pref_loss", f"'{loss}' is not there; there are: sigmoid, hinge, ipo, orpo, simpo")
        config.put(("preference", "loss_type"), [loss], "pref_loss")
        if weight := config.take("pref_ftx", 0.0):
            config.put(("preference", "rpo_alpha"), weight, "pref_ftx")
        if loss == "simpo":
            config.put(("preference", "simpo_gamma"), config.take("simpo_gamma", 0.5), "simpo_gamma")
        if (alpha := config.take("ld_alpha")) is not None:
            config.put(("preference", "ld_alpha"), alpha, "ld_alpha")
    for key in ("ref_model", *names):
        ours = {"kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight"}.get(
            key, key.removeprefix("dpo_")
        )
        if value := config.take(key):
            config.put(("preference", ours), value, key)
    for key in ("pref_bco_weight", "ref_model_adapters", "ref_model_quantization_bit"):
        if config.take(key):
            config.problem(key, "is not there")


def _lora(config: _Translator) -> None:
    rank = config.take("lora_rank", 8)
    config.put(("adapter", "r"), rank, "lora_rank")
    alpha = config.take("lora_alpha", rank * 2 if isinstance(rank, int) else 16)
    config.put(("adapter", "lora_alpha"), alpha, "lora_alpha")
    config.put(("adapter", "lora_dropout"), config.take("lora_dropout", 0.0), "lora_dropout")
    names = _names(config.take("lora_target", "all"))
    config.put(("adapter", "target_modules"), "all-linear" if "all" in names else names, "lora_target")
    if extra := config.take("additional_target"):
        config.put(("adapter", "modules_to_save"), _names(extra), "additional_target")
    for key in ("use_rslora", "use_dora"):
        if config.take(key, False):
            config.put(("adapter", key), True, key)
    steps = config.take("pissa_iter", 16)
    if config.take("pissa_init", False):
        init = "pissa" if steps == -1 else f"pissa_niter_{steps}"
        config.put(("adapter", "init_lora_weights"), init, "pissa_init", "pissa_iter")


def _stored(config: _Translator, bits: Any) -> None:
    by, kind = config.take("quantization_method", "bnb"), config.take("quantization_type", "nf4")
    double = config.take("double_quantization", True)
    if bits is None:
        return
    if bits not in (4, 8) or by not in ("bnb", "bitsandbytes"):
        config.problem("quantization_bit", f"{_json(bits)} by '{by}' is not there; there are 4 and 8, as by 'bnb'")
        return
    source = "quantization_bit" if "quantization_bit" in config.given else "finetuning_type"
    config.put(("quantize",), kind if bits == 4 else "int8", source)
    config.put(("double_quantization",), double, "double_quantization")


_LORA_KEYS = ("lora_", "pissa_", "use_rslora", "use_dora", "additional_target")


def _method(config: _Translator) -> None:
    method = config.take("finetuning_type", "lora")
    bits = config.take("quantization_bit", 4 if method == "qlora" else None)
    method = "lora" if method == "qlora" else method
    if method not in ("lora", "full", "freeze"):
        config.problem("finetuning_type", f"'{method}' is not there; there are: lora, qlora, full, freeze")
        method = "lora"
    config.put(("adapter", "method"), method, "finetuning_type")
    _stored(config, bits)
    if method == "lora":
        _lora(config)
    elif method == "freeze":
        layers = config.take("freeze_trainable_layers", 2)
        config.put(("adapter", "num_layers"), layers, "freeze_trainable_layers")
    others = {"lora": ("freeze_trainable_",), "freeze": _LORA_KEYS, "full": (*_LORA_KEYS, "freeze_trainable_")}
    for key in [key for key in config.left if key.startswith(others[method])]:
        config.take(key)
        config.note(key, f"it does not matter to finetuning_type '{method}'")


def _batches(config: _Translator) -> None:
    rows, steps = config.take("per_device_train_batch_size", 8), config.take("gradient_accumulation_steps", 1)
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if isinstance(rows, int) and isinstance(steps, int):
        config.put(("train", "batch_size"), rows * steps, *keys)
    else:
        config.problem(keys[0] if not isinstance(rows, int) else keys[1], "must be a whole number")
    if (limit := config.take("max_steps", -1)) != -1:
        config.put(("train", "max_steps"), limit, "max_steps")
    ratio, warmup = config.take("warmup_ratio"), config.take("warmup_steps")
    if isinstance(warmup, int | float) and warmup >= 1 and isinstance(limit, int) and limit >= warmup:
        config.put(("train", "warmup_ratio"), warmup / limit, "warmup_steps", "max_steps")
    elif warmup and (not isinstance(warmup, float) or warmup >= 1):
        config.problem("warmup_steps", f"{_json(warmup)}: write 'warmup_ratio', a share of all updates")
    else:
        config.put(("train", "warmup_ratio"), warmup or ratio or 0.0, "warmup_steps" if warmup else "warmup_ratio")


def _numbers(config: _Translator) -> None:
    dtype = "auto"
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("pure_bf16", "bfloat16")):
        if config.take(key, False):
            dtype = name
            config.put(("train", "dtype"), name, key)
    if dtype == "auto":
        config.put(("train", "dtype"), dtype, "bf16")
    off = config.take("disable_gradient_checkpointing", False)
    asked = config.take("gradient_checkpointing", not off)
    key = "gradient_checkpointing" if "gradient_checkpointing" in config.given else "disable_gradient_checkpointing"
    config.put(("train", "gradient_checkpointing"), bool(asked), key)


def _reports(config: _Translator) -> None:
    trackers = config.take("report_to", [])
    trackers = trackers if isinstance(trackers, list) else [trackers]
    if config.take("use_swanlab", False):
        trackers = [*trackers, "swanlab"]
    config.put(("train", "report_to"), [name for name in trackers if name != "none"], "report_to", "use_swanlab")
    strategy, steps = config.take("save_strategy", "steps"), config.take("save_steps", 500)
    if strategy == "steps":
        config.put(("train", "save_steps"), steps, "save_steps")
    elif strategy != "no":
        config.note("save_strategy", "checkpoints are written every 'train.save_steps' updates, and at the end")
    if strategy != "steps" and config.result.data.get("train", {}).pop("save_total_limit", None) is not None:
        config.note("save_total_limit", "no checkpoints are written on the way")


def _data(config: _Translator) -> None:
    folder = config.take("dataset_dir", "data")
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        config.problem("dataset_dir", "must be a local folder; download the data first")
        return
    if (names := config.take("dataset")) is None:
        config.problem("dataset", "is missing; it names the data to train on")
    else:
        config.put(("data", "train"), _sources(config, "dataset", names, Path(folder)), "dataset", "dataset_dir")
    if names := config.take("eval_dataset"):
        config.put(
            ("data", "eval"), _sources(config, "eval_dataset", names, Path(folder)), "eval_dataset", "dataset_dir"
        )
    size = config.take("val_size", 0.0)
    if isinstance(size, int | float) and size > 0:
        config.put(("data", "eval_size"), int(size) if size >= 1 else size, "val_size")
    strategy = config.take("eval_strategy", config.take("evaluation_strategy", "no"))
    steps = config.take("eval_steps")
    if strategy == "steps":
        config.put(("train", "eval_steps"), steps or config.given.get("logging_steps", 500), "eval_steps")
    elif strategy == "epoch":
        config.note("eval_strategy", "held-out rows are evaluated every 'train.eval_steps' updates, and at the end")
    for key in ("add_tokens", "add_special_tokens"):
        if names := config.take(key):
            config.put(("data", key), _names(names), key)
    if config.take("resize_vocab") is not None:
        config.note("resize_vocab", "the vocabulary grows by as many rows as the new tokens need")
    if config.take("train_on_prompt", False):
        config.put(("data", "train_on"), "all", "train_on_prompt")
    pretraining = config.result.data.get("objective") == "pretrain"
    neat = config.take("neat_packing", False)
    packing = bool(config.take("packing", pretraining) or neat)
    config.put(("data", "packing"), packing, "neat_packing" if neat else "packing")


def _sources(config: _Translator, key: str, names: Any, folder: Path) -> list[dict[str, Any]]:
    """Answer the files that the names of data sets stand for."""
    listing = folder / "dataset_info.json"
    known: Any = {}
    if os.path.isfile(listing):
        try:
            known = read_object(listing, RecipeError)
        except RecipeError as error:
            config.problem(key, str(error))
            return []
    sources = []
    for name in _names(names):
        if name in known:
            entry = known[name] if isinstance(known[name], dict) else {}
            sources.append(_source(config, key, name, entry, folder))
        elif files := [path for path in (folder / name, *_called(folder, name)) if os.path.isfile(path)]:
            sources.append({"path": str(files[0])})
        else:
            stems = [path.stem for path in folder.glob("*.*")] if os.path.isdir(folder) else []
            config.problem(
                key, f"'{name}' is neither in {listing} nor a file in {folder}{did_you_mean(name, [*known, *stems])}"
            )
    return sources


def _called(folder: Path, name: str) -> list[Path]:
    """The files of a folder that are called `name`, with any ending."""
    return (
        sorted(path for path in folder.iterdir() if path.name.startswith(f"{name}.")) if os.path.isdir(folder) else []
    )


# LLaMA-Factory's names for columns -> the names that its formats have in the file.
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_TAGS = {
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function"),
    "system_tag": ("system",),
}


def _source(config: _Translator, key: str, name: str, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Answer the file of one entry of ``dataset_info.json``, with the names of its columns."""
    kinds = {"file_name": str, "tags": dict, "columns": dict}
    if wrong := [field for field, kind in kinds.items() if not isinstance(entry.get(field) or kind(), kind)]:
        config.problem(key, f"'{name}': dataset_info.json: {', '.join(wrong)} of a wrong kind")
        return {"path": str(folder / name)}
    if not entry.get("file_name"):
        config.problem(key, f"'{name}' is not a local file; download it, and give 'file_name' in dataset_info.json")
        return {"path": str(folder / name)}
    source: dict[str, Any] = {"path": str(folder / entry["file_name"])}
    if bool(entry.get("ranking")) != (config.given.get("stage") in ("dpo", "rm")):
        told = "holds preference pairs" if entry.get("ranking") else "holds no preference pairs ('ranking: true')"
        config.problem(key, f"'{name}' {told}; 'stage: dpo' and 'stage: rm' learn from those")
    if entry.get("num_samples"):
        config.problem(key, f"'{name}': num_samples cannot be honoured; use 'max_samples'")
    for tag, value in (entry.get("tags") or {}).items():
        if value not in _TAGS.get(tag, ()):
            config.problem(key, f"'{name}': {tag}: '{value}' is not read; it may be {' or '.join(_TAGS.get(tag, ()))}")
    if columns := entry.get("columns"):
        turns = "messages" if entry.get("formatting") == "openai" else "conversations"
        source["columns"] = {
            (_COLUMNS | {"messages": turns}).get(ours, ours): theirs for ours, theirs in columns.items()
        }
    return source


def _names(value: Any) -> list[str]:
    return (
        [str(name) for name in value] if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    )


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


_PARTS: tuple[Callable[[_Translator], None], ...] = (_same, _stage, _method, _data, _batches, _numbers, _reports)
