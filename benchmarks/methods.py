"""Every method of the registry on the same rows: what it trains, what it costs, what it takes off the held-out loss.

    python benchmarks/methods.py --data FILE [--model smollm2-135m-q4] [--seeds 1,2,3] [--jobs 6] [--device cuda]
    python benchmarks/methods.py --table runs/methods.jsonl

The data are rows of `instruction`, `input` (or none) and `output` or `command`; where they have a field `tool`, no tool
of the held-out rows is trained on. Full fine-tuning is the reference; beside it stands what a prompt alone does: the
base with the task told in words, and with solved examples as well. The methods' settings stand in candidates.py.

Each method and seed is a process of its own, `--jobs` at a time. Each adds a line to --results, so the same call goes
on where it was interrupted. Learning rates are found in two calls: `--seeds 1 --scale 0.3,1,3` tries multiples of those
in candidates.py, and `--seeds 2,3` then takes for each method the best of them. They are chosen on the held-out rows,
for all methods alike. Latencies are measured at the end, alone: they do not depend on what was learned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from candidates import APART, LATENCY, METHODS, PROMPTS, REGISTRY, Job
from sft import alpaca_row, split_rows, write_jsonl

ENOUGH = 0.95  # of full fine-tuning's gain

Line = dict[str, Any]  # of the results: label, seed, scale, setting, and what candidates.py answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", default="smollm2-135m-q4")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", help="default: all")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--scale", help="multiples of the learning rates; default: the best that was tried, or 1")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, which share the machine")
    parser.add_argument("--results", type=Path, default=Path("runs/methods.jsonl"))
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="only print the table of these results")
    options = parser.parse_args()
    every = [*METHODS, *PROMPTS, LATENCY]
    options.labels = options.methods.split(",") if options.methods else every
    if unknown := set(options.labels) - set(every):
        parser.error(f"--methods: no {', '.join(sorted(unknown))}; there are: {', '.join(every)}")
    if left_out := REGISTRY.keys() - APART - {fields["method"] for _, fields in METHODS.values()}:
        raise LookupError(f"candidates.py lacks {', '.join(sorted(left_out))}")
    if options.table:
        print(table(read_results(options.table)))
    elif options.data is None:
        parser.error("--data FILE or --table RESULTS is needed")
    else:
        sys.exit(not run_all(options))


# ---- one process for each method and seed ----


def run_all(options: argparse.Namespace) -> bool:
    """Measure what is not among the results yet, and print the table; whether every process succeeded."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    rows = f"{options.data.name}, {options.rows:,} rows, {options.eval_rows:,} held out"
    job = Job(options.model, options.device, options.dtype, options.max_length)
    setting = f"{Path(job.model).name}, {rows}, at most {job.max_length} tokens, {job.dtype}, {job.device}"
    done = read_results(options.results)
    if others := {line["setting"] for line in done} - {setting}:
        raise SystemExit(f"{options.results}: holds results of: {', '.join(others)}; name another file by --results")
    known, writing = {(line["label"], line["seed"], line["scale"]) for line in done}, threading.Lock()
    tasks = [task for task in wanted(options, done) if task not in known]

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        train, held_out = split_rows(options.data, options.rows, options.eval_rows)
        write_jsonl(work / "train.jsonl", [alpaca_row(row) for row in train])
        write_jsonl(work / "held_out.jsonl", [alpaca_row(row) for row in held_out])
        (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")

        def carry_out(task: tuple[str, int, float]) -> bool:
            found = in_a_process(task, work, options.jobs)
            if found is None:
                return False
            line = dict(zip(("label", "seed", "scale"), task, strict=True)) | {"setting": setting} | found
            with writing, options.results.open("a", encoding="utf-8") as results:
                results.write(json.dumps(line) + "\n")
            loss = f"loss {found['before']:.4f} -> {found['after']:.4f}" if "after" in found else "measured"
            print(*task, found.get("refused") or loss, flush=True)
            return True

        with ThreadPoolExecutor(options.jobs) as pool:
            succeeded = list(pool.map(carry_out, [task for task in tasks if task[0] != LATENCY]))
        succeeded += [carry_out(task) for task in tasks if task[0] == LATENCY]
    print(f"\n{table(read_results(options.results))}")
    return all(succeeded)


def wanted(options: argparse.Namespace, done: Sequence[Line]) -> list[tuple[str, int, float]]:
    """Label, seed and multiple of the learning rate of each process."""
    best = {label: lines[0]["scale"] for label, lines in best_runs(done).items()}
    tasks = []
    for seed in map(int, options.seeds.split(",")):
        for label in options.labels:
            scales = map(float, options.scale.split(",")) if options.scale else [best.get(label, 1.0)]
            tasks += [(label, seed, scale) for scale in (scales if label in METHODS else [1.0]) if label != LATENCY]
    return tasks + [(LATENCY, 0, 1.0)] * (LATENCY in options.labels)


def in_a_process(task: tuple[str, int, float], work: Path, jobs: int) -> dict[str, Any] | None:
    """What a process of its own measures; None, with the end of its log told, where it fails."""
    own = Path(tempfile.mkdtemp(dir=work))
    for name in ("train.jsonl", "held_out.jsonl", "job.json"):
        (own / name).write_bytes((work / name).read_bytes())
    label, seed, scale = task
    command = [sys.executable, Path(__file__).with_name("candidates.py"), own, label, str(seed), str(scale)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    surroundings = {"OMP_NUM_THREADS": threads, "SMIDGEN_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"}
    with (own / "log").open("w", encoding="utf-8") as log:
        process = subprocess.run(command, stdout=log, stderr=log, env=surroundings | os.environ, check=False)
    if process.returncode:
        print(*task, "failed:", *(own / "log").read_text(encoding="utf-8").splitlines()[-15:], sep="\n  ", flush=True)
        return None
    return json.loads((own / f"{label}-{seed}.json").read_text(encoding="utf-8"))


def read_results(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# ---- the table ----


def best_runs(results: Sequence[Line]) -> dict[str, list[Line]]:
    """The runs of each label at one learning rate: that of the most seeds, of these that of the lowest mean loss."""
    runs: dict[str, dict[float, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in results:
        if "after" in line:
            runs[line["label"]][line["scale"]].append(line)
    return {
        label: min(scales.values(), key=lambda lines: (-len(lines), mean(lines, "after")))
        for label, scales in runs.items()
    }


def table(results: Sequence[Line]) -> str:
    """Markdown, ordered by gain; below it which methods reach `ENOUGH` of full fine-tuning's, and what was refused."""
    best = best_runs(results)
    if not best:
        return "no results yet"
    before = mean(next(iter(best.values())), "before")
    gains = {label: before - mean(lines, "after") for label, lines in best.items()}
    slow = next((line["latencies"] for line in results if line["label"] == LATENCY), {})
    parts = [
        "| method | trained | share | rate | peak MB | s | held-out loss | gain | of full's | MB | ms/token | merged |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        f"| base | 0 | | | | | {before:.4f} | | | | {milliseconds(slow.get('base'))[0]} | |",
    ]
    for label in sorted(best, key=lambda label: -gains[label]):
        share = f"{gains[label] / gains['full']:.0%}" if "full" in gains else ""
        found = [f"{mean(best[label], 'after'):.4f}{spread(best[label])}", f"{gains[label]:.4f}", share]
        parts.append(" | ".join(["| " + label, *costs(best[label]), *found, *end(best[label], slow.get(label)), ""]))
    counts = sorted({len(lines) for lines in best.values()})
    parts += ["", f"{results[0]['setting']}; {' to '.join(map(str, counts))} seeds, mean ± standard deviation."]
    if "full" in gains:
        enough = [label for label, gain in gains.items() if label != "full" and gain >= ENOUGH * gains["full"]]
        parts.append(f"At least {ENOUGH:.0%} of full fine-tuning's gain: {', '.join(enough) or 'none'}.")
    if worse := [label for label, gain in gains.items() if gain <= 0]:
        parts.append(f"No gain: {', '.join(worse)}.")
    refused = {line["label"]: line["refused"] for line in results if "refused" in line}
    return "\n".join([*parts, *(f"Refused: {label}: {why}" for label, why in refused.items())])


def costs(lines: Sequence[Line]) -> list[str]:
    """Parameters, their share of the base's, learning rate, peak memory, seconds of training."""
    first = lines[0]
    if "trained" not in first:
        return ["0", "", "", "", ""]
    share = f"{100 * first['trained'] / first['total']:.2f} %"
    taken = [f"{mean(lines, 'peak') / 1e6:,.0f}", f"{mean(lines, 'seconds'):.1f}"]
    return [f"{first['trained']:,}", share, f"{first['rate']:.0e}", *taken]


def end(lines: Sequence[Line], seconds: Sequence[float] | None) -> list[str]:
    """Megabytes of the file; milliseconds for each token, not merged and merged."""
    return [f"{lines[0]['bytes'] / 1e6:.2f}" if "bytes" in lines[0] else "", *milliseconds(seconds)]


def milliseconds(seconds: Sequence[float] | None) -> list[str]:
    return [*(f"{1000 * taken:.1f}" for taken in seconds or ()), "", ""][:2]


def mean(lines: Sequence[Line], key: str) -> float:
    return statistics.mean(line[key] for line in lines)


def spread(lines: Sequence[Line]) -> str:
    return f" ± {statistics.stdev(line['after'] for line in lines):.4f}" if len(lines) > 1 else ""


if __name__ == "__main__":
    main()
