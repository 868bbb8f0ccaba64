"""Twenty LoRA steps on real rows. As a program: prints what came out as JSON, for comparison with other releases."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from smidgen.data.rows import TokenRows
from smidgen.recipe import load_recipe
from smidgen.training import proof, run
from smidgen.training.setup import prepare

ROWS = Path(__file__).parents[2] / "recipes" / "quickstart" / "train.jsonl"
PACKAGES = ("transformers", "tokenizers", "huggingface_hub", "accelerate")


def quiet(line: str) -> None:
    """What a run says is not looked at."""


def labels_hash(rows: TokenRows) -> str:
    """A hash over the token ids of the rows and which of them are learned."""
    found = hashlib.sha256()
    for row in rows:
        found.update(row.input_ids.astype("<i4").tobytes() + row.supervised.astype("u1").tobytes())
    return found.hexdigest()


def short_run(model: Path, folder: Path) -> dict[str, Any]:
    """Train in `folder`; answer the versions, the labels' hash, the loss of every step and the checks of the proof."""
    recipe = {
        "model": str(model),
        "adapter": {"method": "lora", "r": 8, "target_modules": "all-linear"},
        "data": {"train": str(ROWS), "limit": 320, "max_length": 256, "eval_size": 16},
        "train": {"max_steps": 20, "batch_size": 4, "learning_rate": 0.003, "dtype": "float32", "logging_steps": 1},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    checked, _ = load_recipe(path)
    with patch.object(proof, "verify_afresh", lambda folder: []):  # takes as long as all else
        found = run.train(checked, say=quiet)
    log = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "labels": labels_hash(prepare(checked, None, quiet).data.train),
        "losses": [json.loads(line)["loss"] for line in log],
        "proof": {check.name: check.passed for check in found.checks},
    }


if __name__ == "__main__":
    print(json.dumps(short_run(Path(sys.argv[1]), Path(sys.argv[2]))))
