"""A DPO step of LoRA beside TRL's DPOTrainer, in one process: tokens per second, peak memory, first loss.

Both get the same pairs as token ids, the same base in bfloat16, LoRA of the same size on all linear layers, AdamW, and
take turns. The reference is the base with the adapter off: computed in the step (`step`), or before (`before`), on both
sides. `trl` is DPOTrainer as it comes: gradient checkpointing, a whole update of `--pairs` at once, LoRA's dropout kept
on (it would switch it off, which ours then has to do too: that is the rows with dropout 0). `trl-tuned` is it as well
as it goes: no checkpointing, and the update cut into micro-batches of `--micro` pairs of like length, which saves
padding. Tokens are those of both rows of each pair, without padding; ratios are to the tuned.

    python benchmarks/dpo.py --data PAIRS.jsonl --model FOLDER [--pairs 16] [--micro 4] [--repeat 5]

Needs peft, trl and datasets; Linux or macOS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from smidgen import kernels, threads
from smidgen.data.preference_data import prepare_preferences
from smidgen.losses.preference import PreferenceLoss
from smidgen.models.fuse import fused
from smidgen.models.load import load_model, stop_token_ids
from smidgen.models.peft_model import get_peft_model
from smidgen.recipe import DataRecipe, Source
from smidgen.training.memory import PeakMemory, keep_freed

RANK, ALPHA, BETA, RATE = 8, 16, 0.1, 1e-5
VARIANTS = ("trl", "trl-tuned", "smidgen")
REFERENCES = ("step", "before")
DROPOUTS = (0.05, 0.0)

Step = Callable[[], float]  # makes one update, answers the loss


def read(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The base, its tokenizer, and the pairs of one update."""
    model, tokenizer = load_model(Path(options.model), "bfloat16", device=torch.device("cpu"), say=quiet)
    data = DataRecipe(train=[Source(options.data)], max_length=options.max_length, limit=options.pairs)
    pairs = prepare_preferences(data, tokenizer, stop_ids=stop_token_ids(model, tokenizer)).train
    return model, tokenizer, pairs


def quiet(line: str) -> None:
    """What is told while things are set up."""


def ours(options: argparse.Namespace, reference: str, dropout: float, stack: ExitStack) -> Step:
    from smidgen.adapters.methods.lora import LoraConfig
    from smidgen.losses.reduce import mean_share
    from smidgen.models.scores import shares_beginnings
    from smidgen.training.objectives import Collating
    from smidgen.training.preference import Preference
    from smidgen.training.reference import precompute

    model, tokenizer, pairs = read(options)
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    model = get_peft_model(model, config)
    stack.enter_context(fused(model, quiet))
    objective = Preference(PreferenceLoss({"sigmoid": 1.0}, beta=BETA))
    objective.begin(model, as_base=True)
    sharing = shares_beginnings(model)
    how = Collating(max(1024, int(pairs.lengths.max())), True, tokenizer.pad_token_id, sharing)
    if reference == "before":
        pairs = precompute(model, objective, pairs, how, None, quiet)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)

    def step() -> float:
        keep_freed(True)
        optimizer.zero_grad()
        batches, total = objective.collate(pairs, range(len(pairs)), how), 0.0
        with torch.no_grad():
            batches = objective.prepare(model, batches)
        for batch in batches:
            share = mean_share(objective.loss(model, batch).values, len(pairs))
            share.backward()
            total += share.item()
        optimizer.step()
        return total

    return step


def trl(options: argparse.Namespace, reference: str, dropout: float, tuned: bool) -> Step:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:  # the pairs are token ids already
            return dataset

    _, tokenizer, pairs = read(options)
    rows = [
        {
            "prompt_ids": pair.chosen.input_ids[: pair.chosen.prompt_length].tolist(),
            "chosen_ids": pair.chosen.input_ids[pair.chosen.prompt_length :].tolist(),
            "rejected_ids": pair.rejected.input_ids[pair.rejected.prompt_length :].tolist(),
        }
        for pair in pairs
    ]
    rows.sort(key=lambda row: -max(len(row["prompt_ids"]) + len(row[key]) for key in ("chosen_ids", "rejected_ids")))
    size = options.micro if tuned else options.pairs
    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        beta=BETA,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=-(-len(rows) // size),
        gradient_checkpointing=not tuned,
        precompute_ref_log_probs=reference == "before",
        disable_dropout=dropout == 0,
        max_length=None,
        bf16=True,  # autocast over the bfloat16 base
        optim="adamw_torch_fused",
        learning_rate=RATE,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    examples: Any = list(trainer.train_dataset)
    model, optimizer = trainer.model, trainer.create_optimizer()
    if not tuned:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()

    def step() -> float:
        keep_freed(False)
        optimizer.zero_grad()
        total = 0.0
        for begin in range(0, len(examples), size):
            part = examples[begin : begin + size]
            inputs = trainer._prepare_inputs(trainer.data_collator(part))
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs) * (len(part) / len(examples))
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return step


def make(variant: str, options: argparse.Namespace, reference: str, dropout: float, stack: ExitStack) -> Step:
    if variant == "smidgen":
        return ours(options, reference, dropout, stack)
    return trl(options, reference, dropout, variant == "trl-tuned")


def alone(variant: str, options: argparse.Namespace) -> None:
    """In a process of its own: two updates, and the most memory that the process took."""
    with ExitStack() as stack, PeakMemory(torch.device("cpu")) as memory:
        step = make(variant, options, options.reference[0], options.dropout[0], stack)
        for _ in range(2):
            step()
    print(json.dumps({"peak": memory.peak}))


def peak_of(variant: str, reference: str, dropout: float) -> int:
    given = [*sys.argv[1:], "--alone", variant, "--reference", reference, "--dropout", str(dropout)]
    done = subprocess.run([sys.executable, __file__, *given], capture_output=True, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=16, help="of an update, the first of the file")
    parser.add_argument("--micro", type=int, default=4, help="pairs that trl-tuned computes at once")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--reference", nargs="+", default=REFERENCES, choices=REFERENCES)
    parser.add_argument("--dropout", nargs="+", type=float, default=DROPOUTS)
    parser.add_argument("--no-peaks", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--alone", choices=VARIANTS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options)
        return
    tokens = int(read(options)[2].lengths.sum())
    print(f"{kernels.chosen()}; {threads.told(torch.get_num_threads())}; {options.pairs} pairs, {tokens:,} tokens")
    print(
        f"{'variant':10} {'reference':9} {'dropout':>7} {'tokens/s':>9} {'ratio':>6} {'peak MB':>8} {'first loss':>11}"
    )
    for reference in options.reference:
        for dropout in options.dropout:
            with ExitStack() as stack:
                steps = {name: make(name, options, reference, dropout, stack) for name in options.variants}
                first = {name: step() for name, step in steps.items()}
                seconds: dict[str, list[float]] = {name: [] for name in steps}
                for _ in range(options.repeat):
                    for name, step in steps.items():
                        begun = time.perf_counter()
                        step()
                        seconds[name].append(time.perf_counter() - begun)
            del steps
            rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
            base = rates.get("trl-tuned") or next(iter(rates.values()))
            for name, rate in rates.items():
                peak = "" if options.no_peaks else f"{peak_of(name, reference, dropout) / 1e6:.0f}"
                row = (
                    f"{name:10} {reference:9} {dropout:7} {rate:9.0f} {rate / base:6.2f} {peak:>8} {first[name]:11.4f}"
                )
                print(row, flush=True)


if __name__ == "__main__":
    main()
