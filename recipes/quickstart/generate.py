"""Writes the rows of the quick start: a request in plain English -> one JSON call of a tool.

train.jsonl and eval.jsonl hold requests with their calls, pairs.jsonl requests with the call that is meant and another
call of the same tool. Every phrasing and every value stands in `phrasings.yaml`, in one list for training and another
for the held-out rows, so nothing that is tested was trained on. The same seed writes the same files, byte for byte:

    python recipes/quickstart/generate.py
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROWS = {"train": 1200, "eval": 100}
PAIRS = 160
SEED = 7
WRAPPED = 0.35  # share of requests that get a polite beginning or end


def request_and_call(tool: str, spec: dict, split: str, words: dict, rng: random.Random) -> tuple[str, dict]:
    """Answer one request and the call it stands for, both made of the values of `split` alone."""
    phrasing = rng.choice(spec[split])
    slots = dict(spec["arguments"])
    call: dict = {"tool": tool}
    for name, kind in slots.items():
        if isinstance(kind, dict):  # said by the phrasing: {"on speaker": true, otherwise: false}
            call[name] = next((value for mark, value in kind.items() if mark in phrasing), kind["otherwise"])
        elif "{" + name + "}" in phrasing:
            call[name] = rng.choice(words[kind][split])
    request = phrasing.format(**call)
    if rng.random() < WRAPPED:
        request = rng.choice(words["wrappers"][split]).format(request)
    return request[0].upper() + request[1:] if rng.random() < 0.6 else request, call


def make_rows(split: str, source: dict, rng: random.Random) -> list[dict]:
    """Answer `ROWS[split]` different rows, each tool equally often, in a shuffled order."""
    tools = list(source["tools"].items())
    rows: dict[str, dict] = {}
    while len(rows) < ROWS[split]:
        tool, spec = tools[len(rows) % len(tools)]
        request, call = request_and_call(tool, spec, split, source["words"], rng)
        answer = json.dumps(call, ensure_ascii=False)
        messages = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        rows.setdefault(re.sub(r"\W+", " ", request.lower()), {"messages": messages})
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return ordered


def make_pairs(source: dict, rng: random.Random) -> list[dict]:
    """Answer `PAIRS` requests of training, each with the call that it stands for and a wrong one of the same tool."""
    tools, rows = list(source["tools"].items()), []
    while len(rows) < PAIRS:
        tool, spec = tools[len(rows) % len(tools)]
        (request, call), (_, other) = (
            request_and_call(tool, spec, "train", source["words"], rng) for _ in ("right", "wrong")
        )
        if other != call:
            chosen, rejected = (json.dumps(each, ensure_ascii=False) for each in (call, other))
            rows.append({"prompt": request, "chosen": chosen, "rejected": rejected})
    return rows


def main(folder: Path) -> None:
    source = yaml.safe_load((HERE / "phrasings.yaml").read_text(encoding="utf-8"))
    files = {split: make_rows(split, source, random.Random(SEED)) for split in ROWS}
    for name, rows in (files | {"pairs": make_pairs(source, random.Random(SEED))}).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
