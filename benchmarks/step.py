"""One step of LoRA: peft as it is used, smidgen on plain PyTorch, and smidgen with its kernels.

    python benchmarks/step.py --model FOLDER --rows 4 --length 512 --dropout 0.05 --repeat 5

The variants take turns in one process, so that a change of the machine's speed meets all; the medians are compared.
Peak memory is that of a process of its own for each variant. `smidgen bench` is the short form.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from smidgen import kernels, threads
from smidgen.models.load import load_model
from smidgen.training.memory import PeakMemory
from smidgen.training.step import VARIANTS, Step, Task, compare, make_step, table


def make(variant: str, options: argparse.Namespace, stack: ExitStack) -> tuple[torch.nn.Module, Step]:
    """The model as each would load it, and its step."""
    if variant == "peft":
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    else:
        model, _ = load_model(Path(options.model), options.dtype, device=torch.device("cpu"))
    task = Task(options.rows, options.length, options.dropout, options.checkpointing)
    return model, make_step(variant, model, task, stack)


def alone(variant: str, options: argparse.Namespace) -> None:
    """In a process of its own: two steps, and the most memory they took."""
    with ExitStack() as stack, PeakMemory(torch.device("cpu")) as memory:
        _, step = make(variant, options, stack)
        for _ in range(2):
            step()
    print(json.dumps({"peak": memory.peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--alone", choices=VARIANTS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options)
        return
    with ExitStack() as stack:
        made = {variant: make(variant, options, stack) for variant in options.variants}
        model = made[options.variants[0]][0]
        task = Task(options.rows, options.length, options.dropout)
        results, speed = compare({variant: step for variant, (_, step) in made.items()}, model, task, options.repeat)
    del made, model
    for variant in options.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", variant]
        found = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.splitlines()[-1]
        results[variant] = replace(results[variant], peak=json.loads(found)["peak"])
    print(f"{kernels.chosen()}; product {speed / 1e9:.0f} GFLOP/s; {threads.told(torch.get_num_threads())}")
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
