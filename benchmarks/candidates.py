"""The methods of methods.py, with their settings, and what one process measures of one of them.

methods.py starts `python candidates.py FOLDER LABEL SEED SCALE`; the folder holds job.json, train.jsonl and
held_out.jsonl, and gets LABEL-SEED.json. Heavy imports stand in the functions, so that methods.py can name the methods
at no cost.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from contenders import ROWS_PER_UPDATE, read_jsonl

from smidgen.errors import MergeError, TargetError
from smidgen.registry import METHODS as REGISTRY

TASK = "Answer with one shell command that does what is asked, and with nothing else."
TOKENS = 256  # rows of the embedding for trainable_tokens: those of the most frequent tokens
SOFT = {"num_virtual_tokens": 20}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": TASK}

# label: the learning rate for some dozens of updates of 16 rows, and the recipe's `adapter`.
METHODS: dict[str, tuple[float, dict[str, Any]]] = {
    "full": (2e-4, {"method": "full"}),
    "freeze": (5e-4, {"method": "freeze"}),
    "lora": (2e-3, {"method": "lora", "r": 8, "lora_alpha": 16}),
    "adalora": (5e-3, {"method": "adalora", "lora_alpha": 24, "tinit": 5, "tfinal": 10}),
    "loha": (3e-3, {"method": "loha", "r": 8, "alpha": 16}),
    "lokr": (3e-3, {"method": "lokr", "r": 8, "alpha": 16}),
    "vera": (1e-2, {"method": "vera"}),
    "randlora": (3e-4, {"method": "randlora"}),
    "fourierft": (5e-2, {"method": "fourierft", "init_weights": True}),
    "miss": (5e-4, {"method": "miss"}),
    "shira": (2e-3, {"method": "shira", "r": 8}),
    "oft": (1e-3, {"method": "oft"}),
    "boft": (3e-3, {"method": "boft"}),
    "hra": (3e-3, {"method": "hra"}),
    "ia3": (1e-2, {"method": "ia3"}),
    "bitfit": (3e-3, {"method": "bitfit"}),
    "ln_tuning": (1e-2, {"method": "ln_tuning"}),
    "trainable_tokens": (3e-3, {"method": "trainable_tokens", "token_indices": [*range(TOKENS)]}),
    "bottleneck houlsby": (2e-3, {"method": "bottleneck", "kind": "houlsby"}),
    "bottleneck pfeiffer": (2e-3, {"method": "bottleneck", "kind": "pfeiffer"}),
    "bottleneck parallel": (5e-4, {"method": "bottleneck", "kind": "parallel"}),
    "prompt_tuning": (3e-2, SOFT | TEXT | {"method": "prompt_tuning"}),
    "p_tuning": (3e-3, SOFT | {"method": "p_tuning", "encoder_hidden_size": 128}),
    "prefix_tuning": (5e-3, SOFT | {"method": "prefix_tuning", "prefix_projection": True, "encoder_hidden_size": 128}),
    "p_tuning_v2": (3e-2, SOFT | {"method": "p_tuning_v2"}),
}
APART = {"fusion"}  # of the registry: it chooses among adapters that were trained before
PROMPTS = {"hard prompt": 0, "few-shot": 4}  # label: solved examples before the request
LATENCY = "latency"  # the label of the process that measures it of all methods
NEW_TOKENS, REPEATS = 32, 2


@dataclass(frozen=True)
class Job:
    """What all processes are asked to do."""

    model: str
    device: str
    dtype: str
    max_length: int


@dataclass(frozen=True)
class Task:
    """What one process is asked to do: measure a label, with a multiple of its learning rate, in a folder."""

    job: Job
    folder: Path
    label: str
    seed: int
    scale: float


def measure(task: Task) -> dict[str, Any]:
    """What is known of the label afterwards; where the model has nothing that the method trains, why not."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=task.job.device == "cpu")
    if accelerator.device.type != task.job.device:
        raise SystemExit(f"--device {task.job.device}: this machine has {accelerator.device.type}")
    if task.label == LATENCY:
        return latencies(task, accelerator)
    try:
        return prompted(task, accelerator) if task.label in PROMPTS else trained(task, accelerator)
    except TargetError as error:
        return {"refused": str(error).splitlines()[0]}


def prepared(task: Task, accelerator: Any) -> Any:
    """The model and the rows, as `smidgen train` makes them."""
    from accelerate.utils import set_seed

    from smidgen.recipe import load_recipe
    from smidgen.training.setup import prepare

    rate, adapter = METHODS.get(task.label, METHODS["full"])
    data = {"train": str(task.folder / "train.jsonl"), "eval": str(task.folder / "held_out.jsonl")}
    train = {"batch_size": ROWS_PER_UPDATE, "learning_rate": rate * task.scale, "warmup_ratio": 0.1}
    recipe = {
        "model": task.job.model,
        "adapter": adapter,
        "data": data | {"max_length": task.job.max_length, "on_long": "truncate"},
        "train": train | {"dtype": task.job.dtype},
        "output": str(task.folder / "run"),
        "seed": task.seed,
    }
    path = task.folder / f"{task.label}-{task.seed}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    set_seed(task.seed)
    return prepare(load_recipe(path)[0], None, print, accelerator.device)


def trained(task: Task, accelerator: Any) -> dict[str, Any]:
    """Train for an epoch as `smidgen train` does, without its forecast and its proof."""
    from smidgen.models.fuse import fused
    from smidgen.models.load import stop_token_ids
    from smidgen.models.quantize import parameter_count
    from smidgen.models.save import save_complete
    from smidgen.training.loop import Loop, evaluate
    from smidgen.training.memory import PeakMemory, keep_freed
    from smidgen.training.setup import make_trainable

    keep_freed(True)
    setup = prepared(task, accelerator)
    model, rows = setup.model, setup.data.train
    held_out = (setup.objective, setup.data.eval, setup.how, accelerator)
    before, total = evaluate(model, *held_out)["loss"], parameter_count(model)
    if "token_indices" in setup.recipe.adapter:
        frequent = Counter(rows.ids.tolist()).most_common(TOKENS)
        setup.recipe.adapter["token_indices"] = [token for token, _ in frequent]
    make_trainable(setup, print)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    folder = task.folder / f"{task.label}-{task.seed}"
    folder.mkdir()
    with fused(model):
        loop = Loop(
            model=model,
            objective=setup.objective,
            rows=rows,
            held_out=None,
            train=setup.recipe.train,
            how=setup.how,
            seed=task.seed,
            folder=folder,
            accelerator=accelerator,
            autocast=setup.autocast,
            learners=setup.learners,
        )
        begun = time.perf_counter()
        with PeakMemory(accelerator.device) as memory:
            loop.fit()
        seconds = time.perf_counter() - begun
    if setup.autocast:  # weights trained in float32 are saved, and judged, as the model has them
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(setup.autocast)
    after = evaluate(model, *held_out)["loss"]
    save_complete(model, setup.tokenizer, stop_token_ids(model, setup.tokenizer), folder / "saved")
    return {
        "before": before,
        "after": after,
        "trained": parameters,
        "total": total,
        "peak": memory.peak,
        "seconds": seconds,
        "bytes": sum(path.stat().st_size for path in (folder / "saved").glob("*.safetensors")),
        "rate": setup.recipe.train.learning_rate,
    }


def prompted(task: Task, accelerator: Any) -> dict[str, Any]:
    """The loss of the same held-out answers where a prompt tells the base what to do; nothing is trained."""
    from smidgen.data import encode_prompt
    from smidgen.models.scores import row_losses
    from smidgen.training.loop import evaluate

    setup = prepared(task, accelerator)
    train, held_out = (read_jsonl(str(task.folder / f"{name}.jsonl")) for name in ("train", "held_out"))
    before = [{"role": "system", "content": TASK}]
    for shot in random.Random(task.seed).sample(train, PROMPTS[task.label]):
        before += [{"role": "user", "content": asked(shot)}, {"role": "assistant", "content": shot["output"]}]
    rows = []
    for row in setup.data.eval:
        request = asked(held_out[int(row.where.rpartition(":")[2]) - 1])
        prompt = encode_prompt([*before, {"role": "user", "content": request}], setup.tokenizer)
        answer = slice(row.prompt_length, None)
        rows.append((prompt + row.input_ids[answer].tolist(), [False] * len(prompt) + row.supervised[answer].tolist()))
    losses, counts = row_losses(setup.model, rows), [sum(learned) for _, learned in rows]
    after = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    found = evaluate(setup.model, setup.objective, setup.data.eval, setup.how, accelerator)
    return {"before": found["loss"], "after": after}


def asked(row: dict[str, str]) -> str:
    return "\n\n".join(filter(None, (row["instruction"], row["input"])))


def latencies(task: Task, accelerator: Any) -> dict[str, Any]:
    """Seconds for each generated token: of the base, and of each method while it is not merged and when it is."""
    from smidgen.models.load import load_model
    from smidgen.models.peft_model import get_peft_model
    from smidgen.models.resolve import resolve_model
    from smidgen.recipe import adapter_config

    model: Any = load_model(resolve_model(task.job.model), task.job.dtype, device=accelerator.device)[0]
    found: dict[str, Any] = {"base": [seconds_per_token(model)]}
    for label, (_, fields) in METHODS.items():
        if hasattr(REGISTRY[fields["method"]].load(), "select"):
            continue  # it is the base, with other weights
        try:
            get_peft_model(model, adapter_config(fields)).eval()
        except TargetError as error:
            print(f"{label}: {error}")
            continue
        found[label] = [seconds_per_token(model)]
        try:
            model.merge_adapter()
            found[label].append(seconds_per_token(model))
            model.unmerge_adapter()
        except MergeError as error:
            print(f"{label}: {error}")
        model.unload()
    return {"latencies": found}


def seconds_per_token(model: Any) -> float:
    """The best of some greedy generations of `NEW_TOKENS` tokens after a short prompt, which counts too."""
    import torch
    from transformers import GenerationConfig

    ids, best = torch.arange(3, 19, device=model.device)[None], math.inf
    for tokens in (2, *[NEW_TOKENS] * REPEATS):
        config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        begun = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()
        if tokens == NEW_TOKENS:
            best = min(best, (time.perf_counter() - begun) / tokens)
    return best


def main(folder: Path, label: str, seed: int, scale: float) -> None:
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    found = measure(Task(job, folder, label, seed, scale))
    (folder / f"{label}-{seed}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
