"""One epoch of LoRA on the CPU, five ways: seconds, tokens per second, peak memory, and what was learned.

Same rows, base model in bfloat16, LoRA, rows per update, learning rate and schedule, held-out rows and threads for all.
Every contender is a process of its own, so its peak memory is its own; with --repeat they take turns and medians are
told. Held-out loss is taken by one function, in one more process, with every adapter loaded by peft: the mean over the
tokens of the answers, the prompt masked, in the model's chat template.

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ROWS_PER_UPDATE = 16
LEARNING_RATE = 2e-4
SEED = 42

Row = dict[str, str]


@dataclass(frozen=True)
class Job:
    """What a process is asked to do: `output` is the folder for the adapter; `adapters` are those to be measured."""

    model: str
    train: str
    held_out: str
    max_length: int
    threads: int
    output: str
    adapters: dict[str, str]


# ---- the contenders: each trains, saves its adapter, and answers what it measured ----


def padded(job: Job) -> dict[str, Any]:
    """The script that many tutorials show: an Alpaca text, every row padded to the maximum, every position learned."""
    from datasets import Dataset
    from transformers import Trainer

    model, tokenizer = load(job)
    tokenizer.pad_token = tokenizer.eos_token  # and no data collator that masks padding
    texts = [alpaca_text(row) for row in read_jsonl(job.train)]
    tokens = tokenizer(texts, truncation=True, max_length=job.max_length, padding="max_length")
    tokens["labels"] = tokens["input_ids"].copy()  # prompt and padding are learned too
    arguments = training_arguments(
        job,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # 16 rows an update
        bf16=True,  # autocast over the bfloat16 base
        optim="adamw_torch",
    )
    trainer = Trainer(
        model=peft_model(model, lora_dropout=0.1),  # the dropout of that script
        args=arguments,
        train_dataset=Dataset.from_dict(dict(tokens)),
        processing_class=tokenizer,
    )
    return fit(trainer, job, tokens=sum(map(sum, tokens["attention_mask"])))


def tuned(job: Job) -> dict[str, Any]:
    """Trainer and peft as well as they go: what is wasteful in `padded` is gone."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer

    model, tokenizer = load(job)
    rows = token_rows(job.train, job, model, tokenizer)  # the prompt is masked
    arguments = training_arguments(
        job,
        per_device_train_batch_size=4,  # small batches of like length: little padding, logits that stay small
        gradient_accumulation_steps=4,  # 16 rows an update
        train_sampling_strategy="group_by_length",  # rows of like length share an update
        bf16=True,  # autocast: the LoRA products in bfloat16 too
        optim="adamw_torch_fused",
    )
    trainer = Trainer(
        model=peft_model(model, lora_dropout=0.0),  # masks for dropout cost a quarter of a step
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads to the longest row of a batch, labels with -100
        processing_class=tokenizer,
    )
    return fit(trainer, job, tokens=sum(len(row["input_ids"]) for row in rows))


def trl(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer as it comes: its batch of 8, gradient checkpointing on, autocast to bfloat16."""
    return sft_trainer(job, gradient_accumulation_steps=ROWS_PER_UPDATE // 8)


def trl_packed(job: Job) -> dict[str, Any]:
    """TRL's SFTTrainer, rows packed into blocks: best-fit decreasing, positions restart, no gradient checkpointing.

    Without flash attention (it needs a GPU) SDPA keeps the rows of a block apart by a mask, so one block at a time is
    best. As many blocks are accumulated as hold the rows of one update on average.
    """
    model, tokenizer = load(job)
    tokens = sum(len(row["input_ids"]) for row in token_rows(job.train, job, model, tokenizer))
    blocks = tokens / job.max_length / len(read_jsonl(job.train)) * ROWS_PER_UPDATE
    return sft_trainer(
        job,
        packing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=max(1, round(blocks)),
        gradient_checkpointing=False,  # there is memory enough
    )


def sft_trainer(job: Job, **settings: Any) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = load(job)
    rows = [
        {
            "prompt": [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in read_jsonl(job.train)
    ]
    trainer = SFTTrainer(
        model=model,
        args=training_arguments(job, SFTConfig, max_length=job.max_length, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    result = fit(trainer, job, tokens=sum(map(len, trainer.train_dataset["input_ids"])))
    return result | {"note": f"attention: {model.config._attn_implementation}"}


def smidgen(job: Job) -> dict[str, Any]:
    """The package, with the defaults of its recipes but for what all contenders share."""
    import yaml

    from smidgen.recipe import load_recipe
    from smidgen.training.loop import Loop
    from smidgen.training.run import train

    folder = Path(job.output)
    recipe = {
        "model": job.model,
        "adapter": {"method": "lora", **LORA},
        "data": {"train": job.train, "max_length": job.max_length, "on_long": "truncate"},  # cut as the others cut
        "train": {
            "batch_size": ROWS_PER_UPDATE,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "dtype": "bfloat16",
        },
        "output": str(folder / "run"),
        "seed": SEED,
    }
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result: dict[str, Any] = {}
    plain_fit = Loop.fit

    def timed_fit(loop: Loop) -> None:
        with training_clock(result):
            plain_fit(loop)
        result.update(tokens=int(loop.lengths.sum()), updates=loop.total)

    Loop.fit = timed_fit
    train(load_recipe(folder / "recipe.yaml")[0])
    (folder / "run" / "adapter").rename(folder / "adapter")
    return result


CONTENDERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "padded": padded,
    "tuned": tuned,
    "trl": trl,
    "trl-packed": trl_packed,
    "smidgen": smidgen,
}


# ---- what the contenders share ----


def load(job: Job) -> tuple[Any, Any]:
    """The base model in bfloat16, and its tokenizer with a chat template and a padding token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smidgen.data.templates import choose_template

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokenizer.chat_template = choose_template(tokenizer, None, "alpaca").text
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16), tokenizer


def peft_model(model: Any, lora_dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=lora_dropout, **LORA))


def training_arguments(job: Job, kind: Any = None, **settings: Any) -> Any:
    """TrainingArguments, or the `kind` that is derived from them."""
    from transformers import TrainingArguments

    return (kind or TrainingArguments)(
        output_dir=f"{job.output}/trainer",
        num_train_epochs=1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        seed=SEED,
        use_cpu=True,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )


def fit(trainer: Any, job: Job, tokens: int) -> dict[str, Any]:
    """Train and save the adapter; `tokens` are those of the rows, without padding."""
    result: dict[str, Any] = {"tokens": tokens}
    with training_clock(result):
        trainer.train()
    trainer.model.save_pretrained(f"{job.output}/adapter")
    return result | {"updates": trainer.state.global_step}


@contextmanager
def training_clock(result: dict[str, Any]) -> Iterator[None]:
    result["begun"], begin = time.time(), time.perf_counter()
    yield
    result["seconds"] = time.perf_counter() - begin


def token_rows(path: str, job: Job, model: Any, tokenizer: Any) -> list[dict[str, list[int]]]:
    """The rows in the chat template as `input_ids` and `labels`, the prompt masked; no other process makes them so."""
    from smidgen.data import prepare_data
    from smidgen.models.load import stop_token_ids
    from smidgen.recipe import DataRecipe, Source

    data = DataRecipe(train=[Source(path)], max_length=job.max_length, on_long="truncate")
    rows = prepare_data(data, tokenizer, stop_ids=stop_token_ids(model, tokenizer)).train
    return [
        {
            "input_ids": row.input_ids.tolist(),
            "labels": [token if learned else -100 for token, learned in zip(row.input_ids.tolist(), row.supervised)],
        }
        for row in rows
    ]


def alpaca_text(row: Row) -> str:
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}"


# ---- held-out loss ----


def measure(job: Job) -> dict[str, Any]:
    """The losses of the base and of every adapter: on the chat format, and on the Alpaca text, which `padded` learns."""
    import torch
    from peft import PeftModel

    base, tokenizer = load(job)
    chats = token_rows(job.held_out, job, base, tokenizer)
    texts = []
    for row in read_jsonl(job.held_out):
        ids = tokenizer(alpaca_text(row), truncation=True, max_length=job.max_length)["input_ids"]
        texts.append({"input_ids": ids, "labels": ids})

    def losses(model: Any) -> dict[str, float]:
        return {"chat": mean_token_loss(model, chats), "alpaca": mean_token_loss(model, texts)}

    found = {"base": losses(base.eval())}
    for name, folder in job.adapters.items():
        model = PeftModel.from_pretrained(base, folder)
        found[name] = losses(model.eval())
        base = model.unload()
    capabilities = [flag for flag, there in torch.cpu.get_capabilities().items() if there is True]
    return {"losses": found, "flags": [flag for flag in capabilities if "bf16" in flag or "amx" in flag]}


def mean_token_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Cross-entropy in nats, the mean over all labels that are not -100; row by row, so nothing is padded."""
    import torch

    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


# ---- rows ----


def read_jsonl(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def split_rows(path: Path, rows: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """So many rows of a data file to train on, and to hold out: a seeded choice; a `tool` is only ever on one side."""
    from smidgen.data.read import read_rows

    every = [row for _, row in read_rows(path)]
    group_of = [row.get("tool", number) for number, row in enumerate(every)]
    groups = sorted(set(group_of))
    random.Random(SEED).shuffle(groups)
    rank = {group: place for place, group in enumerate(groups)}
    order = sorted(range(len(every)), key=lambda number: rank[group_of[number]])
    aside = {group_of[number] for number in order[:held_out]}
    kept = [row for row, group in zip(every, group_of) if group not in aside]
    if len(kept) < rows:
        raise SystemExit(f"{path}: {len(every):,} rows; {len(kept):,} are left for training, not {rows:,}: see --rows")
    return random.Random(SEED).sample(kept, rows), [every[number] for number in order[:held_out]]


def alpaca_row(row: Row) -> Row:
    answer = row["output"] if "output" in row else row["command"]
    return {"instruction": row["instruction"], "input": row.get("input") or "", "output": answer}


# ---- one process for each contender, and the table ----


def run(name: str, job: Job, work: Path) -> dict[str, Any] | None:
    """Run this file as a process that does the job; None, with the end of its log told, where that fails."""
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    cache = tempfile.mkdtemp(dir=work)  # so that no run finds the tokens of another
    surroundings = {"OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    start = time.time()
    with (work / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, __file__, "--process", name, str(work)],
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


def do(name: str, work: Path) -> None:
    """The process of a contender, or of the measurement."""
    import torch

    job = Job(**json.loads((work / "job.json").read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    result = (measure if name == "measure" else CONTENDERS[name])(job)
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


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
    """Markdown; speeds compare training seconds, as all learn from the same rows."""
    seconds = {row["contender"]: row["training_seconds"] for row in found}
    lines = [
        "| contender | set-up s | training s | tokens/s | process s | peak MB | held-out loss | x padded | x tuned | note |",
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
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in cpuinfo.open() if "model name" in line] if cpuinfo.exists() else []
    )
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "peft", "trl")]
    return ", ".join(
        [names[0] if names else platform.machine(), *(flags or ["no bf16"]), f"{threads} threads", *versions]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=1000)
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
    settings = f"{options.rows:,} rows, {options.eval_rows:,} held out, {ROWS_PER_UPDATE} rows an update"
    print(f"\n{told}\n{settings}, {options.repeat} runs\n\n{table(found)}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    answer = {"machine": told, "settings": settings, "contenders": found, "runs": runs, "losses": measured["losses"]}
    options.output.write_text(json.dumps(answer, indent=2), encoding="utf-8")
    if not all(len(of_one) == options.repeat for of_one in runs.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        do(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
