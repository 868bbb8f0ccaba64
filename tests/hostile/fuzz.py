"""Looks for input that is neither read nor refused in plain words: ``python -m tests.hostile.fuzz DOOR --minutes 10``.

DOOR is recipe, data, adapter or template. Good input is spoiled at random, by its structure (hypothesis) and, where
atheris is installed, byte by byte as the lines that were reached tell (``--atheris``). For each input: it is read, or a
`SmidgenError` says why not; in less than 2 s and 300 MB; and no file is written. The first that is otherwise ends the
search and stands in ``fuzz-DOOR.bin``. ``python -m tests.hostile.fuzz DOOR --again FILE`` reads it once more.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from smidgen.errors import SmidgenError
from tests.hostile.cases import DOORS, adapter_folder

SECONDS, MEGABYTES = 2.0, 300

# ---- what is spoiled ----

RECIPE = b"""model: HuggingFaceTB/SmolLM2-135M
adapter: {method: lora, r: 8, lora_alpha: 16, target_modules: [q_proj, v_proj], rank_pattern: {q_proj: 4}}
data:
  train: [{path: a.jsonl, weight: 0.5}, {path: b.jsonl, weight: 5e-1, columns: {prompt: q}}]
  eval_size: 0.1
  max_length: 512
  packing: false
train: {epochs: 1, learning_rate: 2e-4, batch_size: 8, lr_scheduler_type: cosine, report_to: [tensorboard]}
objective: sft
output: run
seed: 7
"""
LLAMAFACTORY = b"""model_name_or_path: a/b
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: alpaca
template: llama3
cutoff_len: 2048
output_dir: out
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
"""
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]], "system": ""},
    {"prompt": "a", "completion": "b"},
    {"text": "\u00e4 \U0001f600"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b", "weight": 1},
        ],
        "tools": '[{"type": "function"}]',
    },
]
TEMPLATES = [
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% set ns = namespace(a='') %}{% for m in messages[::-1] %}{% set ns.a = m.content ~ ns.a %}{% endfor %}"
    "{{ ns.a }}",
    "{% macro f(x) %}[{{ x | tojson }}]{% endmacro %}{% for m in messages %}{{ f(m.content.split('</think>')[-1]) }}"
    "{% endfor %}{% if tools is not none and tools | length > 0 %}{{ tools | map('string') | join(', ') }}{% endif %}",
    "{% for m in messages if m.role != 'x' %}{% generation %}{{ '%s: %s' % (m.role, m.content) }}{% endgeneration %}"
    "{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y')[:0] }}",
]
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 1.5, 1e308, float("inf"), float("nan"),
    "", "a", "8", "\0", "\ud800", "../x", "/etc/passwd", "x" * 5000, "(" * 50, "(a+)+$", "*",
    [], {}, [[]], [None], {"": 0}, ["a"] * 300, {"a": {"a": {"a": 1}}}, [1, "a", None],
]  # fmt: skip
BITS = [
    "{{ x }}", "{% for a in range(99999) %}", "{% endfor %}", " ~ m", " * 99999", " ** 99", "|list", "|join(m)",
    "|sort", "|tojson(indent=4)", "|replace('', m.content)", ".__class__", "['__init__']", "[::-1]", "|map('upper')",
    "|batch(3)", "|indent(99)", " % m", ".format(m, m)", ".split()", "|sum", "|groupby('role')", "|unique",
    "namespace(a=m)", "dict(m)", "cycler(1, 2)", "loop(messages)", "recursive", "{% set m = [m, m] %}",
    "{% filter upper %}", "{% endfilter %}", "{% call(x) f(1) %}", "{% endcall %}", "{% include 'a' %}", "|e", "|safe",
    "{% raw %}", "-", "(", ")", "'", "{#", "%}",
]  # fmt: skip


def spoil_bytes(data: bytes, dice: random.Random) -> bytes:
    """Change some bytes: cut, doubled, exchanged, of other values, special ones put in."""
    parts = [
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\r",
        b"\n",
        b'"',
        b"[" * 99,
        b"{" * 99,
        b"&a",
        b"*a",
        b"!!",
        b"9" * 99,
    ]
    for _ in range(dice.randint(1, 6)):
        at, to = sorted(dice.randint(0, len(data)) for _ in range(2))
        kind = dice.randrange(5)
        if kind == 0:
            data = data[:at] + data[to:]
        elif kind == 1:
            data = data[:to] + data[at:to] * dice.choice((1, 2, 50)) + data[to:]
        elif kind == 2:
            data = data[:at] + dice.choice(parts) + data[at:]
        elif kind == 3 and data:
            data = data[: max(0, at - 1)] + bytes([dice.randrange(256)]) + data[at:]
        else:
            data = data[:at] + data[at:to][::-1] + data[to:]
    return data[:200_000]


def spoil_value(value: Any, dice: random.Random) -> Any:
    """Change a value of JSON somewhere within: another value, another key, one more, one less."""
    if isinstance(value, dict) and value and dice.random() < 0.85:
        key = dice.choice(list(value))
        kind = dice.randrange(8)
        if kind == 0:
            return {name: item for name, item in value.items() if name != key}
        if kind == 1:
            return {**value, dice.choice(("x", "", "r", "role", "auto_map", "a" * 300)): dice.choice(ODD)}
        return {**value, key: spoil_value(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.85:
        at = dice.randrange(len(value))
        return [*value[:at], spoil_value(value[at], dice), *value[at + dice.randrange(2) :]]
    return dice.choice(ODD)


def _recipe(dice: random.Random) -> bytes:
    import yaml

    text = dice.choice((RECIPE, LLAMAFACTORY))
    if dice.random() < 0.6:
        value = yaml.safe_load(text)
        for _ in range(dice.randint(1, 3)):
            value = spoil_value(value, dice)
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=dice.random() < 0.5).encode(errors="replace")
    return text if dice.random() < 0.4 else spoil_bytes(text, dice)


def _data(dice: random.Random) -> bytes:
    rows: list[Any] = [dice.choice(ROWS)] * 2 + [dice.choice(ROWS)]
    for _ in range(dice.randint(0, 3)):
        rows = spoil_value(rows, dice)
    ending = dice.choice((b"jsonl", b"json", b"csv", b"tsv", b"txt", b"parquet"))
    if ending == b"json":
        text = json.dumps(rows).encode()
    elif ending == b"parquet":
        text = _parquet_bytes()
    elif ending in (b"csv", b"tsv"):
        comma = "," if ending == b"csv" else "\t"
        lines = [("prompt", "completion"), ("a", '"b"'), rows if isinstance(rows, list) else [rows]]
        text = "\n".join(comma.join(map(str, row)) for row in lines).encode(errors="replace")
    else:
        text = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows])).encode()
    return ending + b"\n" + (text if dice.random() < 0.4 else spoil_bytes(text, dice))


def _parquet_bytes() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    columns = {"prompt": ["a", "b"], "completion": ["c", "d"], "x": [[1], None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def _adapter(dice: random.Random) -> bytes:
    """The configuration, a line break, and the weights."""
    folder = GOOD["adapter"]
    config: Any = json.loads((folder / "adapter_config.json").read_text())
    for _ in range(dice.randint(0, 3)):
        config = spoil_value(config, dice)
    text = json.dumps(config).replace("\n", " ").encode()
    weights = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    header: Any = json.loads(weights[8 : 8 + length])
    if dice.random() < 0.6:
        for _ in range(dice.randint(1, 3)):
            header = spoil_value(header, dice)
        new = json.dumps(header).encode()
        weights = len(new).to_bytes(8, "little") + new + weights[8 + length :]
    if dice.random() < 0.3:
        text = spoil_bytes(text, dice).replace(b"\n", b" ")
    if dice.random() < 0.3:
        weights = spoil_bytes(weights, dice)
    return text + b"\n" + weights


def _template(dice: random.Random) -> bytes:
    text = dice.choice(TEMPLATES)
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        at = dice.randint(0, len(text))
        if dice.random() < 0.7:
            text = text[:at] + dice.choice(BITS) + text[at:]
        else:
            text = text[:at] + text[at + dice.randint(1, 9) :]
    return text.encode()


# ---- who reads it ----


def _write_recipe(data: bytes, folder: Path) -> Path:
    (folder / "recipe.yaml").write_bytes(data)
    return folder / "recipe.yaml"


def _write_data(data: bytes, folder: Path) -> Path:
    ending, _, rest = data.partition(b"\n")
    known = ending.decode("latin-1") if ending in (b"jsonl", b"json", b"csv", b"tsv", b"txt", b"parquet") else "jsonl"
    path = folder / f"data.{known}"
    path.write_bytes(rest)
    return path


def _write_adapter(data: bytes, folder: Path) -> Path:
    config, _, weights = data.partition(b"\n")
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


def _write_template(data: bytes, folder: Path) -> Path:
    (folder / "template.jinja").write_bytes(data)
    return folder / "template.jinja"


TARGETS: dict[str, tuple[Callable[[random.Random], bytes], Callable[[bytes, Path], Path]]] = {
    "recipe": (_recipe, _write_recipe),
    "data": (_data, _write_data),
    "adapter": (_adapter, _write_adapter),
    "template": (_template, _write_template),
}
GOOD: dict[str, Path] = {}
COUNTS: Counter[str] = Counter()


def read(door: str, data: bytes, folder: Path) -> None:
    """Let the door read `data`; raise AssertionError, or what came through, where the law is broken."""
    for old in folder.iterdir():
        old.unlink()
    _keep(door, data)  # a crash of the whole process leaves it behind
    path = TARGETS[door][1](data, folder)
    written = {file.name for file in folder.iterdir()}
    process = psutil.Process()
    before, begin = process.memory_info().rss, time.process_time()
    try:
        DOORS[door][0](path)
        COUNTS["read"] += 1
    except SmidgenError as error:
        COUNTS["refused"] += 1
        str(error).encode()
    taken, grown = time.process_time() - begin, (process.memory_info().rss - before) / 2**20
    assert taken < SECONDS, f"{taken:.1f} s"
    assert grown < MEGABYTES, f"{grown:.0f} MB"
    assert {file.name for file in folder.iterdir()} == written, "a file was written"


def _keep(door: str, data: bytes) -> None:
    Path(f"fuzz-{door}.bin").write_bytes(data)


def by_structure(door: str, minutes: float, folder: Path) -> None:
    """Spoil good input by its structure until the time is over."""
    until = time.monotonic() + 60 * minutes
    make = TARGETS[door][0]

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(st.randoms(use_true_random=False))
    def spoiled(dice: random.Random) -> None:
        data = make(random.Random(dice.getrandbits(64)))
        read(door, data, folder)

    while time.monotonic() < until:
        spoiled()


def by_coverage(door: str, minutes: float, folder: Path) -> None:
    """Spoil good input as the lines that were reached tell, until the time is over."""
    import atheris

    dice = random.Random(1)
    seeds = Path(tempfile.mkdtemp(prefix="seeds-"))
    for number in range(50):
        (seeds / str(number)).write_bytes(TARGETS[door][0](dice))

    def one(data: bytes) -> None:
        read(door, data, folder)

    options = [
        f"-max_total_time={round(60 * minutes)}",
        "-max_len=20000",
        "-timeout=20",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(seeds)], one)
    atheris.Fuzz()


def warm(door: str) -> None:
    """Import all that reads, so that the time of an input is its own."""
    if door == "adapter":
        GOOD["adapter"] = adapter_folder(Path(tempfile.mkdtemp(prefix="fuzz-")))
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(20):
            for old in Path(scratch).iterdir():
                old.unlink()
            with suppress(SmidgenError):
                DOORS[door][0](TARGETS[door][1](TARGETS[door][0](random.Random(seed)), Path(scratch)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("door", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage")
    parser.add_argument("--again", type=Path, help="read this file once")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    if options.atheris:
        import atheris

        with atheris.instrument_imports(include=["smidgen"]):
            warm(options.door)
    else:
        warm(options.door)
    if options.again:
        read(options.door, options.again.read_bytes(), scratch)
    elif options.atheris:
        by_coverage(options.door, options.minutes, scratch)
    else:
        by_structure(options.door, options.minutes, scratch)
    print(f"{options.door}: {COUNTS['read']:,} inputs read, {COUNTS['refused']:,} refused, nothing else")


if __name__ == "__main__":
    main()
