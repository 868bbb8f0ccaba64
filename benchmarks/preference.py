"""Preference tuning and reward models on pairs, held out in turn: which of two answers is the better one?

Questions that are nearly the same stay in one fold. Each method is trained on the other folds by an ordinary recipe,
and asked about the pairs of its fold with the adapter off (`before`) and on (`after`): right is the pair whose chosen
answer has the higher reward, the implicit one of the method or the reward model's score; equal ones count half. Beside
it: how often the chosen answer is the likelier one, and how often the longer one. Intervals are of the mean over folds
(Student's t, 95 %). What is done is kept in OUTPUT/results.jsonl, and not done again.

    python benchmarks/preference.py --data PAIRS.jsonl --model MODEL [--methods dpo,reward] [--folds 5] [--limit N]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig

from smidgen.data.audit import lengths_of, near_groups, prompt_text
from smidgen.data.preference import Pair, read_preferences
from smidgen.data.preference_data import prepare_preferences
from smidgen.data.read import read_rows
from smidgen.errors import TrainingStopped
from smidgen.losses.preference import PreferenceLoss
from smidgen.models.fuse import fused
from smidgen.models.load import stop_token_ids
from smidgen.models.open import find, open_model
from smidgen.models.scores import shares_beginnings
from smidgen.recipe import DataRecipe, Source, load_recipe
from smidgen.training.objectives import Collating, Objective
from smidgen.training.preference import Preference
from smidgen.training.reference import fixed_batches
from smidgen.training.reward import Reward
from smidgen.training.run import train

METHODS = ("dpo", "ipo", "orpo", "kto", "simpo", "reward")
RATE = 2e-4
SETTINGS = {"simpo": {"beta": 2.0, "simpo_gamma": 1.0}}  # within what its paper advises; the others are as they come
MAX_LENGTH = 256
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by folds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--folds", type=int, default=5, choices=sorted(STUDENT))
    parser.add_argument("--limit", type=int, help="only the first pairs")
    parser.add_argument("--epochs", type=float, default=0.75)
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/preference-folds"))
    options = parser.parse_args()
    pairs = read_pairs(options.data, options.limit)
    folds = folds_of(pairs, options.folds)
    sizes = ", ".join(str(len(fold)) for fold in folds)
    print(f"{len(pairs):,} pairs in folds of {sizes}", flush=True)
    results = options.output / "results.jsonl"
    done = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("methods", "output")}
    for method in options.methods.split(","):
        for number in range(len(folds)):
            key = {"method": method, "fold": number, "settings": settings}
            if any(key.items() <= line.items() for line in done):
                continue
            line = key | one_fold(method, number, pairs, folds, options)
            done.append(line)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps({name: value for name, value in line.items() if name != "settings"}), flush=True)
    print(table(options.methods.split(","), [line for line in done if line["settings"] == settings], pairs, folds))


def read_pairs(path: Path, limit: int | None) -> list[Pair]:
    return read_preferences(str(path), read_rows(path)).examples[:limit]


def folds_of(pairs: list[Pair], count: int) -> list[list[int]]:
    """Indices of pairs; groups of near questions, the large ones first, each into the smallest fold."""
    groups = near_groups([prompt_text(pair) for pair in pairs])
    random.Random(0).shuffle(groups)
    folds: list[list[int]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):
        min(folds, key=len).extend(group)
    return folds


# ---- one fold ----


def one_fold(method: str, number: int, pairs: list[Pair], folds: list[list[int]], options: Any) -> dict[str, Any]:
    """Train on the other folds; answer how many pairs of this one are right, before and after, and the seconds."""
    folder = options.output / f"{method}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    others = [pairs[index] for at, fold in enumerate(folds) if at != number for index in fold]
    write(folder / "train.jsonl", [row for pair in others for row in rows_of(pair, method)])
    write(folder / "eval.jsonl", [row for index in folds[number] for row in rows_of(pairs[index], "dpo")])
    recipe = {
        "model": options.model,
        "adapter": {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        | _upper(options.model),
        "data": {"train": str(folder / "train.jsonl"), "max_length": MAX_LENGTH},
        "objective": method,
        "train": {
            "epochs": options.epochs,
            "learning_rate": options.learning_rate,
            "batch_size": 16,
            "micro_batch_tokens": 2048,
            "dtype": options.dtype,
        },
        "output": str(folder / "run"),
    }
    if method != "reward":
        recipe["watch"] = {"refusals": False}
    if method in SETTINGS:
        recipe["preference"] = SETTINGS[method]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    begun = time.perf_counter()
    with (folder / "told.txt").open("w", encoding="utf-8") as told:
        try:
            proof = train(
                load_recipe(folder / "recipe.yaml")[0], overwrite=True, say=lambda line: print(line, file=told)
            )
        except TrainingStopped as error:
            return {"stopped": str(error)}
    seconds = time.perf_counter() - begun
    return {"seconds": round(seconds, 1), "proof": proof.passed, **asked(method, folder)}


def _upper(model: str) -> dict[str, list[int]]:
    """The upper two thirds of the layers, below which the backward pass ends."""
    layers = AutoConfig.from_pretrained(model).num_hidden_layers
    return {"layers_to_transform": [*range(layers // 3, layers)]}


def rows_of(pair: Pair, method: str) -> list[dict[str, Any]]:
    """The pair as a file holds it; for KTO as two labelled answers."""
    if method != "kto":
        return [{"messages": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}]
    answers = ((pair.chosen, True), (pair.rejected, False))
    return [{"messages": [*pair.prompt, *answer], "label": label} for answer, label in answers]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def asked(method: str, folder: Path) -> dict[str, Any]:
    """Shares of the held-out pairs: right by the reward, and with the chosen answer the likelier one."""
    model, tokenizer = open_model(find(folder / "run"), say=lambda line: None)
    data = DataRecipe(train=[Source(str(folder / "eval.jsonl"))], max_length=MAX_LENGTH)
    rows = prepare_preferences(data, tokenizer, stop_ids=stop_token_ids(model, tokenizer)).train
    loss = {"dpo": "sigmoid", "kto": "sigmoid"}.get(method, method)
    objective: Objective = Reward() if method == "reward" else Preference(PreferenceLoss({loss: 1.0}))
    found: dict[str, Any] = {"pairs": len(rows)}
    with fused(model, lambda line: None):
        shared = method != "reward" and shares_beginnings(model)
        how = Collating(4096, shared, tokenizer.pad_token_id, shared)
        with objective.at_start(model):
            found["before"], found["likelier_before"] = shares(model, objective, rows, how)
        found["after"], found["likelier_after"] = shares(model, objective, rows, how)
    return found


def shares(model: Any, objective: Objective, rows: Any, how: Collating) -> tuple[float, float | None]:
    margins, likelier = [], []
    for batch in fixed_batches(objective, rows, how):
        (batch,) = objective.prepare(model, [batch.to(model.device)])
        metrics = objective.loss(model, batch).metrics
        margins += metrics["rewards/margins"].tolist()
        if "logps/chosen" in metrics:
            likelier += (metrics["logps/chosen"] - metrics["logps/rejected"]).tolist()
    return share(margins), share(likelier) if likelier else None


def share(margins: list[float]) -> float:
    """How many are above 0; those that are 0 count half."""
    return float(np.mean(np.heaviside(margins, 0.5)))


# ---- all folds ----


def table(methods: list[str], lines: list[dict[str, Any]], pairs: list[Pair], folds: list[list[int]]) -> str:
    """A Markdown table with a row for each method."""
    longer = [lengths_of([pairs[index] for index in fold]) for fold in folds]
    baseline = mean_told([found.accuracy(True) for found in longer if found])
    head = ["method", "pairs right before", "after", "chosen likelier before", "after", "seconds a fold"]
    rows = [head, ["---"] * len(head), ["the longer answer", "", baseline, "", "", ""]]
    for method in methods:
        mine = [line for line in lines if line["method"] == method]
        whole = [line for line in mine if "after" in line]
        names = ("before", "after", "likelier_before", "likelier_after")
        cells = [mean_told([line[name] for line in whole if line[name] is not None]) for name in names]
        seconds = f"{statistics.mean(line['seconds'] for line in whole):.0f}" if whole else ""
        stopped = f" ({len(mine) - len(whole)} stopped)" if len(mine) > len(whole) else ""
        rows.append([method + stopped, *cells, seconds])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_told(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1%}" if values else ""
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.1%} ± {100 * half:.1f}"


if __name__ == "__main__":
    main()
