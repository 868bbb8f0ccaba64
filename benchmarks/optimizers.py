"""What an optimizer's states take, on the disk and in memory, and how long an update is; and what pages make possible.

    python benchmarks/optimizers.py [--numbers 50000000] [--repeat 5]
    python benchmarks/optimizers.py --model FOLDER [--steps 20]

Every optimizer has a process of its own, which moves square matrices of so many numbers by random gradients. The peak
is what the process holds beyond parameters and gradients, looked at a hundred times a second; pages of a file that are
in memory count.

With --model that model is fully tuned, as `smidgen train` does it: by adamw; then with half of the memory for adamw's
states taken away (Linux: RLIMIT_DATA, `ulimit -d`), by adamw, which must fail, and by paged_adamw, whose weights and
states must be adamw's to the bit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from kill import write_recipe
from safetensors.torch import load_file
from torch import nn

from smidgen.errors import TrainingStopped
from smidgen.recipe import load_recipe
from smidgen.recipe_parts import Optimizer, TrainRecipe
from smidgen.training import checkpoint, proof, run
from smidgen.training.memory import PeakMemory, held
from smidgen.training.optimizers import make_optimizer
from smidgen.training.optimizers.states import state_bytes

WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numbers", type=int, default=50_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--model", help="a folder; tune that model under a limit")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # the optimizer that this process is for
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)  # bytes
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(tune(options) if options.model else measure(options)))
    elif options.model:
        sys.exit(not under_a_limit(options))
    else:
        table(options)


def in_a_process(optim: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What this script answers for one optimizer."""
    given = [f"--{key}={value}" for key, value in vars(options).items() if value is not None]
    command = [sys.executable, __file__, *given, f"--alone={optim}", *more]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, encoding="utf-8").stdout
    return json.loads(answer.splitlines()[-1])


# ---- one beside the other ----


def table(options: argparse.Namespace) -> None:
    print(f"{options.numbers // WIDTH**2 * WIDTH**2:,} numbers, {torch.get_num_threads()} threads")
    print(f"{'optimizer':18} {'bytes/number':>12} {'ms/update':>9} {'peak MB':>8}")
    for optim in get_args(Optimizer):
        found = in_a_process(optim, options)
        print(f"{optim:18} {found['bytes']:12.3f} {found['ms']:9.0f} {found['peak'] / 1e6:8.0f}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: the middle of some updates, and the memory that all of them took."""
    count = options.numbers // WIDTH**2
    model = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds = []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        optimizer = make_optimizer(model, TrainRecipe(optim=options.alone), Path(folder))
        cpu = torch.device("cpu")
        before = held(cpu)
        with PeakMemory(cpu) as memory:
            for _ in range(options.repeat + 1):
                begun = time.perf_counter()
                optimizer.step()
                seconds.append(time.perf_counter() - begun)
            memory.peak = max(memory.peak, held(cpu))
    middle = sorted(seconds[1:])[options.repeat // 2]
    each = state_bytes(model, options.alone) / (count * WIDTH**2)
    return {"bytes": each, "ms": 1000 * middle, "peak": memory.peak - before}


# ---- under a limit ----


def under_a_limit(options: argparse.Namespace) -> bool:
    """Whether pages let a run go on that cannot without them, and change no bit."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        free, short, paged = (Path(folder) / name for name in ("free", "short", "paged"))
        whole = in_a_process("adamw", options, f"--folder={free}")
        limit = whole["data"] - whole["states"] // 2
        print(f"adamw: {whole['data'] / 1e6:.0f} MB of its own at the peak, {whole['states'] / 1e6:.0f} of them states")
        print(f"limit: {limit / 1e6:.0f} MB", flush=True)
        failed = in_a_process("adamw", options, f"--folder={short}", f"--limit={limit}")
        print(f"adamw under it: {failed['stopped'] or 'done'}", flush=True)
        done = in_a_process("paged_adamw", options, f"--folder={paged}", f"--limit={limit}")
        print(f"paged_adamw under it: {done['stopped'] or 'done'}, {done['data'] / 1e6:.0f} MB at the peak")
        same = done["stopped"] is None and all(
            equal(*(place / "run/checkpoints" / f"step-{options.steps}" / file for place in (free, paged)))
            for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
        )
        print(f"weights and states after {options.steps} steps: {'equal to the bit' if same else 'DIFFERENT'}")
        print(f"the whole run: {whole['seconds']:.1f} s adamw, {done['seconds']:.1f} s paged_adamw")
    return failed["stopped"] is not None and same


def equal(one: Path, two: Path) -> bool:
    left, right = load_file(one), load_file(two)
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: a full tuning; the most private memory that it had, and why it stopped, if it did."""
    if options.limit:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (options.limit, options.limit))
    proof.verify_afresh = lambda _: []  # which is a process of its own
    changes = [f"train.max_steps={options.steps}", f"train.save_steps={options.steps}", f"train.optim={options.alone}"]
    changes += ["train.dtype=auto", "train.eval_steps=null", f"output={options.folder / 'run'}"]
    recipe, _ = load_recipe(write_recipe(options.folder, options.model, "full"), changes)
    process, done, most = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], process.memory_info().data)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    begun, stopped = time.perf_counter(), None
    try:
        run.train(recipe, say=lambda _: None)
    except TrainingStopped as error:
        stopped = str(error).splitlines()[0]
    seconds = time.perf_counter() - begun
    done.set()
    watching.join()
    written = options.folder / "run/checkpoints" / f"step-{options.steps}" / checkpoint.OPTIMIZER
    states = 0 if stopped else written.stat().st_size
    return {"data": most[0], "states": states, "stopped": stopped, "seconds": seconds}


if __name__ == "__main__":
    main()
