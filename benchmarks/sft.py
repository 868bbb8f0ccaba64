"""One epoch of LoRA on the CPU, five ways: seconds, tokens per second, peak memory, and what was learned.

Same rows, base model in bfloat16, LoRA, rows per update, learning rate and schedule, held-out rows and threads for all.
Every contender is a process of its own, so its peak memory is its own; with --repeat they take turns and medians are
told. Held-out loss is taken by one function, in one more process, with every adapter loaded by peft: the mean over the
tokens of the answers, the prompt masked, in the model's chat template. The contenders and their settings stand in
contenders.py.

    python benchmarks/sft.py --data FILE --model FOLDER_OR_NAME [--rows 1000] [--eval-rows 100] [--repeat 3]

The data are rows of `instruction`, `input` (or none) and `output` or `command`. Where they have a field `tool`, no tool
of the held-out rows is trained on. Needs peft, trl and datasets; Linux or macOS.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, ROWS_PER_UPDATE, SEED, Job, Row

# ---- rows ----


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def split_rows(path: Path, rows: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """At most so many rows of a file to train on, and those held out: a seeded choice.

    No `tool` is on both sides, nor a row that is equal but for its tool.
    """
    from smidgen.data.read import read_rows

    every = [row for _, row in read_rows(path)]
    tools = [row.pop("tool", str(number)) for number, row in enumerate(every)]
    names = sorted(set(tools))
    random.Random(SEED).shuffle(names)
    rank = {name: place for place, name in enumerate(names)}
    order = sorted(range(len(every)), key=lambda number: rank[tools[number]])
    aside = [every[number] for number in order[:held_out]]
    tools_aside = {tools[number] for number in order[:held_out]}
    kept = [row for row, tool in zip(every, tools) if tool not in tools_aside and row not in aside]
    if not kept:
        raise SystemExit(f"{path}: {held_out:,} rows held out of {len(every):,} leave none to train on")
    return random.Random(SEED).sample(kept, min(rows, len(kept))), aside


def alpaca_row(row: Row) -> Row:
    answer = row["output"] if "output" in row else row["command"]
    return {"instruction": row["instruction"], "input": row.get("input") or "", "output": answer}


# ---- one process for each contender, and the table ----


def run(name: str, job: Job, work: Path) -> dict[str, Any] | None:
    """Run a contender, or `measure`, as a process; None, with the end of its log told, where that fails."""
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    cache = tempfile.mkdtemp(dir=work)  # so that no run finds the tokens of another
    surroundings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    start = time.time()
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("contenders.py"), name, str(work)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **surroundings, "SMIDGEN_CACHE": cache},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.time() - start
    if process.returncode:
        tail = (work / f"{name}.log").read_text(encoding="utf-8").splitlines()[-15:]
        print(f"{name} failed:", *tail, sep="\n  ", file=sys.stderr)
        return None
    result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return result | {"start": start, "process_seconds": seconds, "peak_mb": usage.ru_maxrss * unit / 1e6}


def summary(name: str, runs: list[dict[str, Any]], losses: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One contender's medians and losses."""

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(map(value, runs))

    before, after = losses["base"], losses[name]
    notes = [f"{runs[0]['updates']} updates", runs[0].get("note")]
    if name == "padded":
        notes.append(f"own format, all tokens: {before['alpaca']:.3f} -> {after['alpaca']:.3f}")
    return {
        "contender": name,
        "set_up_seconds": median(lambda run: run["begun"] - run["start"]),
        "training_seconds": median(lambda run: run["seconds"]),
        "tokens_per_second": median(lambda run: run["tokens"] / run["seconds"]),
        "process_seconds": median(lambda run: run["process_seconds"]),
        "peak_mb": median(lambda run: run["peak_mb"]),
        "loss_before": before["chat"],
        "loss_after": after["chat"],
        "note": "; ".join(filter(None, notes)),
    }


def table(found: list[dict[str, Any]]) -> str:
    """Markdown. Tokens are those of a contender's own text, without padding; speeds compare the training seconds."""
    seconds = {row["contender"]: row["training_seconds"] for row in found}
    lines = [
        "| contender | set-up s | training s | tokens/s | process s | peak MB | held-out loss "
        "| speed / padded | speed / tuned | note |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in found:
        faster = [
            f"{seconds[other] / row['training_seconds']:.2f}" if other in seconds else ""
            for other in ("padded", "tuned")
        ]
        cells = [
            row["contender"],
            *(f"{row[key]:.1f}" for key in ("set_up_seconds", "training_seconds")),
            *(f"{row[key]:,.0f}" for key in ("tokens_per_second", "process_seconds", "peak_mb")),
            f"{row['loss_before']:.3f} -> {row['loss_after']:.3f}",
            *faster,
            row["note"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(flags: list[str], threads: int) -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl")]
    return ", ".join([f"{platform.machine()} with {' '.join(flags) or 'no bf16'}", f"{threads} threads", *versions])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1000, help="at most; default: %(default)s")
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/sft.json"))
    options = parser.parse_args()
    names = options.contenders.split(",")
    if unknown := set(names) - CONTENDERS.keys():
        parser.error(f"no contender {', '.join(sorted(unknown))}; there are: {', '.join(CONTENDERS)}")

    from smidgen.models.resolve import resolve_model

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        train, held_out = split_rows(options.data, options.rows, options.eval_rows)
        job = Job(
            model=str(resolve_model(options.model).resolve()),
            train=write_jsonl(work / "train.jsonl", [alpaca_row(row) for row in train]),
            held_out=write_jsonl(work / "held_out.jsonl", [alpaca_row(row) for row in held_out]),
            max_length=options.max_length,
            threads=options.threads,
            output="",
            adapters={},
        )
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        adapters: dict[str, str] = {}
        for turn in range(options.repeat):
            for name in names:
                output = work / f"{name}-{turn}"
                if result := run(name, replace(job, output=str(output)), work):
                    runs[name].append(result)
                    adapters[name] = str(output / "adapter")
                    print(f"{name}: {result['seconds']:.1f} s, peak {result['peak_mb']:,.0f} MB", flush=True)
        measured = run("measure", replace(job, adapters=adapters), work)
    if measured is None:
        raise SystemExit(1)
    found = [summary(name, runs[name], measured["losses"]) for name in adapters]
    told = machine(measured["flags"], options.threads)
    settings = (
        f"{options.data.name}: {len(train):,} rows, {len(held_out):,} held out, {ROWS_PER_UPDATE} rows an update, "
    )
    settings += f"at most {options.max_length} tokens a row; medians of {options.repeat}"
    print(f"\n{told}\n{settings}\n\n{table(found)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    answer = {"machine": told, "settings": settings, "contenders": found, "runs": runs, "losses": measured["losses"]}
    options.output.write_text(json.dumps(answer, indent=2), encoding="utf-8")
    if not all(len(of_one) == options.repeat for of_one in runs.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
