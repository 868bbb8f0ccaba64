"""What one epoch of LoRA takes off the held-out loss of a file of instructions and answers.

    python benchmarks/tldr.py --data FILE [--rows 2000] [--eval-rows 200] [--at-least 30]

Where the rows have a field `tool`, no tool of the held-out rows is trained on. Formats are detected; other names of
columns are given as --columns prompt=question completion=reply. Ends with 1 where the loss fell by less than --at-least
percent.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import yaml
from contenders import LORA, ROWS_PER_UPDATE, SEED
from sft import split_rows, write_jsonl

from smidgen.recipe import load_recipe
from smidgen.training.loop import read_log
from smidgen.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", nargs="*", default=[], metavar="FIELD=COLUMN")
    parser.add_argument("--model", default="smollm2-135m-q4")
    parser.add_argument("--rows", type=int, default=2000, help="at most; default: %(default)s")
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--at-least", type=float, default=0.0, metavar="PERCENT")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        columns = dict(pair.split("=", 1) for pair in options.columns) or None
        rows, held_out = split_rows(options.data, options.rows, options.eval_rows)
        data = {
            "train": {"path": write_jsonl(work / "train.jsonl", rows), "columns": columns},
            "eval": {"path": write_jsonl(work / "eval.jsonl", held_out), "columns": columns},
            "max_length": options.max_length,
        }
        recipe = {
            "model": options.model,
            "adapter": {"method": "lora", **LORA},
            "data": data,
            "train": {"learning_rate": options.learning_rate, "batch_size": ROWS_PER_UPDATE},
            "output": str(work / "run"),
            "seed": SEED,
        }
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        begin = time.perf_counter()
        proof = train(load_recipe(work / "recipe.yaml")[0])
        seconds = time.perf_counter() - begin
        speed = statistics.median(line["tokens_per_second"] for line in read_log(work / "run"))

    (loss,) = (check.numbers for check in proof.checks if check.name == "loss")
    fall = 100 * (1 - loss["on"] / loss["off"])
    print(
        f"\n{options.data.name}: {len(rows):,} rows, {loss['rows']:,} held out: "
        f"loss {loss['off']:.4f} -> {loss['on']:.4f}, {fall:.1f} % less; "
        f"{seconds:.0f} s with loading and proof, {speed:,.0f} tokens/s in training"
    )
    if fall < options.at_least:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
