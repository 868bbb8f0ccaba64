"""The quick start's data: generated as committed, typed, and without anything of the held-out rows in training."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.recipe import load_recipe

FOLDER = Path(__file__).parent.parent / "recipes" / "quickstart"
NUMBER = (int, float)
TYPES = {"minutes": int, "brightness": int, "people": int, "degrees": NUMBER, "amount": NUMBER, "speaker": bool}


def read(split: str) -> list[tuple[str, dict]]:
    """Answer (request, call) of each row."""
    rows = [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    return [(row["messages"][0]["content"], json.loads(row["messages"][1]["content"])) for row in rows]


def values(call: dict) -> list[str]:
    return [str(value).lower() for key, value in call.items() if key != "tool" and not isinstance(value, bool)]


def skeleton(request: str, call: dict) -> str:
    """The request without its values, its case and its punctuation: the bare phrasing."""
    text = request.lower()
    for value in sorted(values(call), key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "_", text)
    return " ".join(re.findall(r"\w+", text))


def test_the_generator_writes_the_committed_files(tmp_path: Path):
    subprocess.run([sys.executable, str(FOLDER / "generate.py"), str(tmp_path)], check=True)
    for name in ("train.jsonl", "eval.jsonl", "pairs.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), f"{name} differs"


def test_sizes_tools_and_types():
    train, held_out = read("train"), read("eval")
    assert len(train) >= 1000 and 100 <= len(held_out) <= 200
    tools = {call["tool"] for _, call in train}
    assert 10 <= len(tools) <= 14
    for request, call in train + held_out:
        assert call["tool"] in tools and 1 <= len(call) - 1 <= 4, (request, call)
        for key, value in call.items():
            assert isinstance(value, TYPES.get(key, str)), (request, key, value)
    for rows in (train, held_out):
        counts = {tool: sum(call["tool"] == tool for _, call in rows) for tool in tools}
        assert max(counts.values()) - min(counts.values()) <= 1, counts


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_value_can_be_copied_from_the_request(split: str):
    for request, call in read(split):
        for value in values(call):
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", request.lower()), (request, value)


def test_no_held_out_phrasing_occurs_in_training():
    train = {skeleton(*row) for row in read("train")}
    shared = {skeleton(*row) for row in read("eval")} & train
    assert not shared


def test_no_held_out_value_occurs_in_training():
    train = read("train")
    known = {value for _, call in train for value in values(call)}
    text = "\n".join(request.lower() for request, _ in train)
    for request, call in read("eval"):
        for value in values(call):
            assert value not in known, (request, value)
            # A number may not stand alone in a training request either; "07:15" or "3.5" do not hold 7, 15 or 5.
            assert not re.search(rf"(?<![\w:.]){re.escape(value)}(?![\w:.]\w|\w)", text), (request, value)


def test_the_recipe_is_valid_and_names_these_files():
    recipe, notes = load_recipe(FOLDER.parent / "quickstart.yaml")
    assert notes == []
    named = [Path(source.path) for source in [*recipe.data.train, *(recipe.data.eval or [])]]
    assert [FOLDER.parent.parent / path for path in named] == [FOLDER / "train.jsonl", FOLDER / "eval.jsonl"]


def test_pairs_are_two_calls_of_one_tool_and_nothing_held_out():
    rows = [json.loads(line) for line in (FOLDER / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = {value for _, call in read("eval") for value in values(call)} - {
        value for _, call in read("train") for value in values(call)
    }
    for row in rows:
        chosen, rejected = json.loads(row["chosen"]), json.loads(row["rejected"])
        assert chosen != rejected and chosen["tool"] == rejected["tool"]
        assert not held_out & {*values(chosen), *values(rejected)}
        assert all(value in row["prompt"].lower() for value in values(chosen)), row
