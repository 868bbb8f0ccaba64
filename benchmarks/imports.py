"""Seconds until a library is there, a command has answered, and a training has made its first step.

    python benchmarks/imports.py [--repeat 5] [--recipe recipe.yaml]

Each is a fresh process; they take turns, and medians are compared. `over Python` leaves out what an interpreter that
does nothing takes. A recipe is trained with one update into a folder that is thrown away; its time is the one that the
run tells, so it leaves out the proof. A first round, which fills the caches of disk and tokens, is not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

IMPORTS = {
    "import smidgen": "import smidgen",
    "smidgen: get_peft_model": "from smidgen import get_peft_model",
    "torch": "import torch",
    "transformers: LlamaForCausalLM": "from transformers import AutoModelForCausalLM, LlamaForCausalLM",
    "peft: get_peft_model": "from peft import get_peft_model",
    "trl: SFTTrainer": "from trl import SFTTrainer",
}


def seconds(*arguments: str) -> float:
    """Wall time of a fresh interpreter."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def first_step(recipe: str) -> tuple[float, str]:
    """Seconds until the first update of a run, and where they went, as the run tells."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", "-m", "smidgen", "train", recipe, "train.max_steps=1", f"output={folder}/run"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as run:
            assert run.stdout
            lines = []
            for line in run.stdout:
                lines.append(line)
                if found := re.match(r"first step after ([\d.]+) s: (.*)", line):
                    run.kill()
                    return float(found[1]), found[2]
    sys.exit("".join(lines) + "the run ended before its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--recipe", help="also train this until the first step")
    options = parser.parse_args()
    cases: dict[str, Callable[[], float]] = {"Python": lambda: seconds("-c", "pass")}
    for name, code in IMPORTS.items():
        if importlib.util.find_spec(code.split()[1]):
            cases[name] = lambda code=code: seconds("-c", code)
    cases["smidgen --help"] = lambda: seconds("-m", "smidgen", "--help")
    told: list[tuple[float, str]] = []
    if options.recipe:

        def train() -> float:
            told.append(first_step(options.recipe))
            return told[-1][0]

        cases["smidgen train, first step"] = train
    rounds = [{name: measure() for name, measure in cases.items()} for _ in range(options.repeat + 1)][1:]
    medians = {name: statistics.median(taken[name] for taken in rounds) for name in cases}
    print(f"{'':32}{'seconds':>8}{'fastest':>9}{'over Python':>13}")
    for name, median in medians.items():
        fastest = min(taken[name] for taken in rounds)
        print(f"{name:32}{median:8.2f}{fastest:9.2f}{median - medians['Python']:13.2f}")
    if told:
        print(f"fastest first step: {min(told[1:])[1]}")


if __name__ == "__main__":
    main()
