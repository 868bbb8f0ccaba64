"""How near `smidgen plan` and the forecast of a run are to the measured peak of memory.

    python benchmarks/plan.py [--model smollm2-135m-q4] [--only qwen2] [--output runs/plan]

Each pair of model and method is planned from the configuration alone and trained for two steps, each in a process of
its own. All rows are cut to one length, so that both steps are as large as the largest of a run. The second model has
the shape of Qwen2-0.5B but for the vocabulary, and random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from smidgen.models.resolve import resolve_model
from smidgen.recipe import load_recipe
from smidgen.training import run
from smidgen.training.ways import outlook_of

LORA: dict[str, Any] = {"adapter": {"method": "lora", "target_modules": "all-linear"}}
WAYS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": {"adapter": {"method": "full"}},
    "freeze": {"adapter": {"method": "freeze", "num_layers": 4}},
    "lora, checkpointing": LORA | {"train": {"gradient_checkpointing": True}},
    "lora nf4": LORA | {"quantize": "nf4"},
}
PAIRS = {
    "model": ("lora", "lora, checkpointing", "lora nf4", "full"),
    "qwen2": ("lora", "lora, checkpointing", "lora nf4", "freeze"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-q4")
    parser.add_argument("--data", default="recipes/quickstart/train.jsonl")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--only", default="", help="part of the name of a pair: 'qwen2 lora'")
    parser.add_argument("--output", type=Path, default=Path("runs/plan"))
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(planned(Path(options.plan))))
        return
    options.output.mkdir(parents=True, exist_ok=True)
    places = {"model": resolve_model(options.model)}
    print(f"{'pair':<28} {'planned MB':>10} {'error':>7} {'forecast MB':>12} {'error':>7} {'measured MB':>12}")
    for model, ways in PAIRS.items():
        for way in ways:
            name = f"{model} {way}"
            if options.only not in name:
                continue
            if model not in places:
                places[model] = random_qwen2(options.output / model, places["model"])
            recipe = write_recipe(options, name, places[model], WAYS[way])
            plan = json.loads(subprocess.run([sys.executable, __file__, "--plan", str(recipe)], **KEPT).stdout)
            subprocess.run([sys.executable, "-m", "smidgen", "train", str(recipe), "--overwrite"], **KEPT)
            told = json.loads((recipe.with_suffix("") / "memory.json").read_text(encoding="utf-8"))
            peak, forecast = told["measured"]["peak"], told["forecast"]
            errors = [f"{100 * (found['peak'] / peak - 1):+6.1f}%" for found in (plan, forecast)]
            sizes = [f"{found['peak'] / 1e6:.0f}" for found in (plan, forecast)]
            print(f"{name:<28} {sizes[0]:>10} {errors[0]} {sizes[1]:>12} {errors[1]} {peak / 1e6:>12.0f}", flush=True)
            for part in forecast:
                print(f"    {part:<24} {plan[part] / 1e6:>10.1f} {'':>7} {forecast[part] / 1e6:>12.1f}", flush=True)


KEPT: dict[str, Any] = {"check": False, "stdout": subprocess.PIPE, "encoding": "utf-8"}


def planned(recipe: Path) -> dict[str, int]:
    """The parts of the plan, with the peak; `run` is imported for what it takes."""
    assert run
    found = outlook_of(load_recipe(recipe)[0], say=lambda line: None).found
    (forecast,) = (forecast for way, forecast, _ in found if way.asked)
    return forecast.bytes() | {"peak": forecast.peak}


def write_recipe(options: Any, name: str, model: Path, way: dict[str, Any]) -> Path:
    path = options.output / f"{name.replace(', ', '-').replace(' ', '-')}.yaml"
    recipe = way | {
        "model": str(model),
        "data": {"train": options.data, "max_length": 48, "limit": options.rows},
        "train": {"max_steps": 2, "batch_size": 16, "learning_rate": 1e-4} | way.get("train", {}),
        "output": str(path.with_suffix("")),
    }
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def random_qwen2(folder: Path, tokens: Path) -> Path:
    """A random model of Qwen2-0.5B's shape with the tokenizer of another model."""
    tokenizer = AutoTokenizer.from_pretrained(tokens)
    config = Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM._from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
