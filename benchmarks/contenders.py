"""The contenders of sft.py, and the measurement of what they learned: each runs as a process of its own.

sft.py starts `python contenders.py NAME FOLDER`; the folder holds job.json and gets result.json. Heavy imports stand in
the functions, so that a contender loads nothing but its own, and that sft.py can name them at no cost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    result: dict[str, Any] = {"note": "process s and peak MB with the proof"}
    plain_fit = Loop.fit

    def timed_fit(self: Loop) -> None:
        with training_clock(result):
            plain_fit(self)
        result.update(tokens=int(self.lengths.sum()), updates=self.total)

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
    """The rows in the chat template as `input_ids` and `labels`, the prompt masked."""
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


def read_jsonl(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def alpaca_text(row: Row) -> str:
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n{row['output']}"


# ---- held-out loss ----


def measure(job: Job) -> dict[str, Any]:
    """The losses of the base and of every adapter: in the chat format, and of the Alpaca text that `padded` learns."""
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


def main(name: str, work: Path) -> None:
    import torch

    job = Job(**json.loads((work / "job.json").read_text(encoding="utf-8")))
    torch.set_num_threads(job.threads)
    result = (measure if name == "measure" else CONTENDERS[name])(job)
    (work / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
