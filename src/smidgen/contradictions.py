"""What is wrong between the fields of a recipe that are each fine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smidgen.drafts import Place
from smidgen.recipe_parts import REWARDS, GeneralRecipe, PreferenceRecipe, RewardRecipe, WatchRecipe


def contradictions(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
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
    adapter = data["adapter"] if isinstance(data.get("adapter"), dict) else {}
    method = adapter.get("method")
    for start in ("eva", "corda", "lora_ga", "loftq"):
        if adapter.get(f"{start}_config") and adapter.get("init_lora_weights") != start:
            yield ("adapter", f"{start}_config"), f"has no effect without 'init_lora_weights: {start}'; add that"
    if data.get("quantize") is not None and method in ("full", "freeze"):
        yield ("quantize",), f"'{method}' trains the weights themselves, which 4 and 8 bits cannot hold; take 'lora'"
    if data.get("quantize") is not None and train.get("fsdp") is not None:
        yield ("quantize",), "stored weights cannot be sharded; leave out 'train.fsdp', or load in 16 bits"
    if train.get("fsdp") is not None and train.get("optim", "adamw") != "adamw":
        yield ("train", "optim"), "'fsdp' spreads the states of adamw alone; take 'optim: adamw', or leave out 'fsdp'"
    if train.get("loraplus_lr_ratio") is not None and method in ("full", "freeze"):
        yield ("train", "loraplus_lr_ratio"), f"LoRA+ is for LoRA's matrices, which '{method}' lacks; remove it"
    if (task := data.get("task", "causal_lm")) != "causal_lm":
        if data.get("objective", "sft") != "sft":
            yield ("objective",), f"'task: {task}' learns from labels; leave out the objective"
        for name in ("format", "template", "system", "packing", "train_on"):
            if rows.get(name) not in (None, False, "completion"):
                yield ("data", name), f"has no effect with 'task: {task}', which reads rows with labels; remove it"
        sources = rows["train"] if isinstance(rows.get("train"), list) else []
        if any(source.get("weight") is not None for source in sources if isinstance(source, dict)):
            yield ("data", "train"), f"weights mix tokens of texts; 'task: {task}' takes every row once"
    general = section if isinstance(section := data.get("general"), dict) else {}
    for section, key, fields in (("data", "train", rows), ("data", "eval", rows), ("general", "data", general)):
        sources = fields.get(key)
        sources = sources if isinstance(sources, list) else []
        weighed = [isinstance(source, dict) and source.get("weight") is not None for source in sources]
        if any(weighed) and not all(weighed):
            yield (section, key, weighed.index(False)), "has no weight while other files have one; give each a weight"
    yield from _of_preference(data)
    yield from _of_general(data, method, train)
    if data.get("objective") == "pretrain":
        for name in ("system", "template"):
            if rows.get(name) is not None:
                yield ("data", name), "has no effect with 'objective: pretrain', which reads plain text; remove it"


# What means something to KTO; its weights mean nothing to others.
_OF_KTO = {"beta", "desirable_weight", "undesirable_weight", "ref_model", "precompute_ref_log_probs"}


def _of_preference(data: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    objective = data.get("objective", "sft")
    given, watched = _set(data, "preference", PreferenceRecipe()), _set(data, "watch", WatchRecipe())
    yield from _of_rewards(data, objective)
    if objective not in ("dpo", "kto"):
        for section, names in (("preference", given), ("watch", watched)):
            for name in sorted(names):
                yield (section, name), f"has no effect with 'objective: {objective}'; remove it"
        return
    for name in sorted(given - _OF_KTO if objective == "kto" else given & {"desirable_weight", "undesirable_weight"}):
        yield ("preference", name), f"has no effect with 'objective: {objective}'; remove it"
    if isinstance(train := data.get("train"), dict) and train.get("fsdp") is not None:
        yield ("train", "fsdp"), f"the reference of '{objective}' cannot be sharded; leave out 'fsdp'"


def _of_rewards(data: dict[str, Any], objective: str) -> Iterator[tuple[Place, str]]:
    if objective != "reward":
        for name in sorted(_set(data, "reward", RewardRecipe())):
            yield ("reward", name), f"has no effect with 'objective: {objective}'; remove it"
    rows = rows if isinstance(rows := data.get("data"), dict) else {}
    if objective in REWARDS and rows.get("packing"):
        yield ("data", "packing"), f"'objective: {objective}' reads rows one below the other; leave it out"


def _of_general(data: dict[str, Any], method: Any, train: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    given = _set(data, "general", GeneralRecipe())
    if "data" not in given:
        for name in sorted(given - {"l2"}):
            yield ("general", name), "has no effect without general text; give 'general.data'"
    elif (task := data.get("task", "causal_lm")) != "causal_lm":
        yield ("general", "data"), f"a model of 'task: {task}' predicts no text; 'l2' needs none"
    if "kl" in given and method in ("full", "freeze"):
        yield ("general", "kl"), f"'{method}' trains the base itself, and none is left to compare with; take 'share'"
    if train.get("fsdp") is not None:
        for name in sorted(given & {"ewc", "l2", "kl"}):
            yield ("general", name), "what it compares with cannot be sharded; take 'share', or leave out 'train.fsdp'"


def _set(data: dict[str, Any], section: str, defaults: Any) -> set[str]:
    """The fields of a section that have another value than their default."""
    fields = fields if isinstance(fields := data.get(section), dict) else {}
    return {name for name, value in fields.items() if value != getattr(defaults, name, value)}
