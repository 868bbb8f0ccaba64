"""Kills runs at random moments and goes on with them: nothing that was acknowledged may be lost, not a bit may differ.

    python benchmarks/kill.py --model FOLDER --kills 200

Each kind of run (LoRA with dropout, full tuning, packed rows, a mixture) is carried out once undisturbed. Then it is
killed (SIGKILL) at a moment drawn from the whole length of a run, start, saves and proof included, and taken up again
until it ends; then anew, until there were enough kills. A checkpoint is saved after every step, and acknowledged in a
file once `save` has returned. At the end of each disturbed run its losses, and every tensor of its result and of its
last checkpoint (weights, optimizer, generators), must be those of the undisturbed one to the bit.

Works where processes can be forked (Linux, macOS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.numpy import load_file

from smidgen.errors import UsageError
from smidgen.recipe import load_recipe
from smidgen.training import checkpoint, proof, run

STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"adapter": {"method": "full"}},
    "packed": {"data": {"packing": True}},
    "mixture": {"data": {"train": "mixture"}},
}
LORA = {"method": "lora", "r": 4, "lora_dropout": 0.1, "target_modules": "all-linear"}
COMPARED = ("step", "loss", "lr", "grad_norm", "eval_loss")


@dataclass
class Counts:
    """What happened to one kind of run."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    lost: int = 0
    different: list[str] = field(default_factory=list)


def write_rows(path: Path, names: list[str], count: int) -> None:
    """Stories of different lengths."""
    draw = random.Random(path.name)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            name, things = draw.choice(names), " and a ".join(draw.choices(["cat", "ball", "tree", "hat"], k=5))
            row = {"prompt": f"What did {name} see?", "completion": f"{name} saw a {things}."[: draw.randint(12, 60)]}
            file.write(json.dumps(row) + "\n")


def write_recipe(folder: Path, model: str, kind: str) -> Path:
    """The recipe of one kind of run, in a folder of its own, with its data."""
    folder.mkdir(parents=True)
    one, two = folder / "one.jsonl", folder / "two.jsonl"
    write_rows(one, ["Tom", "Lily", "Ben"], 60)
    write_rows(two, ["Ann", "Max"], 40)
    changes = KINDS[kind]
    data = {"train": str(one), "eval_size": 8, "max_length": 64} | changes.get("data", {})
    if data["train"] == "mixture":
        data["train"] = [{"path": str(one), "weight": 0.7}, {"path": str(two), "weight": 0.3}]
    recipe = {
        "model": model,
        "adapter": changes.get("adapter", LORA),
        "data": data,
        "train": {
            "batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "save_steps": 1,
            "save_total_limit": 2,
            "logging_steps": 1,
            "eval_steps": 5,
        },
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def carry_out(path: Path) -> None:
    """In a process of its own: begin the run or go on with it, acknowledging each checkpoint."""
    folder = path.parent / "run"
    save = checkpoint.save

    def acknowledging(*args: Any, **options: Any) -> Any:
        answer = save(*args, **options)
        with (path.parent / "acknowledged").open("a", encoding="utf-8") as file:
            file.write(f"{args[1]}\n")
        return answer

    checkpoint.save = acknowledging
    proof.verify_afresh = lambda _: []  # it only reads, and takes longer than all the rest
    recipe, _ = load_recipe(path)
    try:
        run.train(recipe, resume=True, say=lambda _: None)
    except UsageError as error:
        if "no checkpoint to resume from" not in str(error):
            raise
        run.train(recipe, overwrite=True, say=lambda _: None)
    assert (folder / "proof.json").is_file()


def forked(action: Callable[[], None], log: Path) -> int:
    """Run an action in a child process; answer its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import torch

        torch.set_num_threads(1)
        action()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def outcome(folder: Path) -> dict[str, Any]:
    """What has to be the same: the losses, and the tensors of the result and of the last checkpoint."""
    found: dict[str, Any] = {}
    lines = (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    found["losses"] = [[json.loads(line).get(key) for key in COMPARED] for line in lines]
    parts = [*(folder / "run").glob("adapter/*.safetensors"), *(folder / "run").glob("model/*.safetensors")]
    for path in [*parts, *sorted((folder / "run" / "checkpoints" / f"step-{STEPS}").glob("*.safetensors"))]:
        tensors = {key: (value.dtype, value.shape, value.tobytes()) for key, value in load_file(path).items()}
        found |= {f"{path.relative_to(folder).as_posix()}: {key}": value for key, value in tensors.items()}
    return found


def moment(folder: Path) -> str:
    """Where the run was when it was killed."""
    run_folder = folder / "run"
    if list(run_folder.glob("checkpoints/.step-*.partial")):
        return "saving a checkpoint"
    if list(run_folder.glob(".*.partial")):
        return "saving the result"
    if (run_folder / "adapter").exists() or (run_folder / "model").exists():
        return "proof"
    return "training" if (run_folder / "log.jsonl").exists() else "starting"


def disturb(kind: str, model: str, kills: int, place: Path, draw: random.Random) -> Counts:
    """Carry out a kind of run undisturbed, then disturbed until it was killed `kills` times and has ended."""
    counts = Counts()
    straight = write_recipe(place / kind / "straight", model, kind)
    begun = time.perf_counter()
    _, status = os.waitpid(forked(lambda: carry_out(straight), place / "log"), 0)
    length = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{kind}: the undisturbed run failed: {(place / 'log').read_text(encoding='utf-8')[-3000:]}")
    expected = outcome(straight.parent)
    while counts.kills < kills:
        path = write_recipe(place / kind / f"disturbed-{counts.finished}", model, kind)
        shutil.copytree(straight.parent, path.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run", "ack*"))
        path.write_text(
            path.read_text(encoding="utf-8").replace(str(straight.parent / "run"), str(path.parent / "run")),
            encoding="utf-8",
        )
        while True:
            child = forked(lambda path=path: carry_out(path), place / "log")
            deadline = time.monotonic() + draw.uniform(0, length) if counts.kills < kills else float("inf")
            done = 0
            while not done and time.monotonic() < deadline:
                time.sleep(0.002)
                done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                counts.kills += 1
                counts.moments[moment(path.parent)] += 1
                counts.lost += lost(path.parent)
                continue
            if status:
                counts.different.append(f"the run failed: {(place / 'log').read_text(encoding='utf-8')[-1500:]}")
            else:
                found = outcome(path.parent)
                counts.different += [
                    name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)
                ]
            break
        counts.finished += 1
        shutil.rmtree(path.parent)
    return counts


def lost(folder: Path) -> int:
    """1 if the newest checkpoint on the disk is older than the last that was acknowledged."""
    acknowledged = folder / "acknowledged"
    steps = [int(line) for line in acknowledged.read_text(encoding="utf-8").split()] if acknowledged.exists() else []
    newest = checkpoint.latest(folder / "run" / "checkpoints")
    return int(bool(steps) and (newest is None or newest.step < steps[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a small model's folder")
    parser.add_argument("--kills", type=int, default=200, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, failed, totals = random.Random(options.seed), False, Counter()
    print(f"{'kind':8} {'kills':>6} {'runs ended':>11} {'lost':>5} {'different':>10}  killed while")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SMIDGEN_CACHE"] = str(Path(scratch) / "cache")
        for kind in KINDS:
            counts = disturb(kind, options.model, options.kills // len(KINDS), Path(scratch), draw)
            moments = ", ".join(f"{name} {count}" for name, count in counts.moments.most_common())
            print(
                f"{kind:8} {counts.kills:6} {counts.finished:11} {counts.lost:5} {len(counts.different):10}  {moments}",
                flush=True,
            )
            for what in counts.different[:3]:
                print(f"  {what}")
            failed = failed or bool(counts.lost or counts.different)
            totals.update(counts.moments)
    print("killed while: " + ", ".join(f"{name} {count}" for name, count in totals.most_common()))
    sys.exit(failed)


if __name__ == "__main__":
    main()
