"""Carries out many runs in one process and prints how much memory the process holds after each ten.

    python benchmarks/flat.py --model FOLDER --runs 100

Every run is a whole one (loading, 20 steps, evaluation, checkpoints, proof); only the check in a fresh process, which
this process does not hold, is left out. Growth is counted from the tenth run on: until then caches fill.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import sys
import tempfile
from pathlib import Path

import psutil
from kill import write_recipe

from smidgen.recipe import load_recipe
from smidgen.training import proof, run

ALLOWED = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a small model's folder")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--kind", default="lora", help="lora, full, packed or mixture, as in kill.py")
    options = parser.parse_args()
    proof.verify_afresh = lambda _: []
    first = held = 0
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SMIDGEN_CACHE"] = str(Path(scratch) / "cache")
        recipe, _ = load_recipe(write_recipe(Path(scratch) / "runs", options.model, options.kind))
        for number in range(1, options.runs + 1):
            with contextlib.redirect_stdout(io.StringIO()):
                run.train(recipe, overwrite=True, say=lambda _: None)
            if number % 10 == 0:
                gc.collect()
                held = psutil.Process().memory_info().rss
                first = first or held
                print(f"after {number:4} runs: {held / 1e6:8.1f} MB, {100 * (held / first - 1):+.2f} %", flush=True)
    sys.exit(held > (1 + ALLOWED) * first)


if __name__ == "__main__":
    main()
