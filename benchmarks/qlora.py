"""QLoRA beside LoRA and beside peft with bitsandbytes: speed, what is learned, and the memory of a large model.

    python benchmarks/qlora.py speed --model FOLDER            steps of LoRA in 16 bits and NF4, and peft's in NF4
    python benchmarks/qlora.py loss --model FOLDER --data FILE  the same rows and steps, from the same start
    python benchmarks/qlora.py large                           1.5B parameters with random weights, 1 x 1024 tokens

NF4 is doubly quantised everywhere. `loss` needs rows of `instruction` and `output`; both need peft and bitsandbytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from smidgen import PeftModel
from smidgen.data.packing import IGNORED, Batch
from smidgen.models.fuse import fused
from smidgen.models.load import load_model
from smidgen.models.quantize import parameter_bytes, parameter_count, quantization_config, quantize_model
from smidgen.models.scores import token_losses
from smidgen.training.memory import PeakMemory, keep_freed
from smidgen.training.step import Task, compare, make_step, table

LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ROWS, HELD_OUT, TOKENS, AT_ONCE = 96, 32, 256, 4


def silent(line: str) -> None:
    """What loading says is not wanted."""


def ours(options: argparse.Namespace, kind: str | None) -> Any:
    config = kind and quantization_config(kind)
    return load_model(Path(options.model), "bfloat16", quantization_config=config, say=silent)[0]


def theirs(options: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, quantization_config=quantization_config("nf4")
    )


def speed(options: argparse.Namespace) -> None:
    task, models = Task(4, 512, options.dropout, False), {}
    models["peft nf4"], models["16 bits"], models["nf4"] = theirs(options), ours(options, None), ours(options, "nf4")
    weights = models["16 bits"]
    with ExitStack() as stack:
        steps = {
            name: make_step("peft" if "peft" in name else "smidgen", model, task, stack, silent)
            for name, model in models.items()
        }
        results, _ = compare(steps, weights, task, options.repeat)
    print("\n".join(table(results)))
    print(f"nf4 beside 16 bits: {results['nf4'].tokens_per_second / results['16 bits'].tokens_per_second:.3f}")


def loss(options: argparse.Namespace) -> None:
    import peft

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = json.loads(Path(options.data).read_text(encoding="utf-8"))[: ROWS + HELD_OUT]
    texts = [f"{row['instruction']}\n\n{row['output']}{tokenizer.eos_token}" for row in rows]
    ids = [tokenizer(text, truncation=True, max_length=TOKENS)["input_ids"] for text in texts]
    train, aside = [padded(ids[i : i + AT_ONCE]) for i in range(0, ROWS, AT_ONCE)], ids[ROWS:]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        reference = peft.get_peft_model(theirs(options), peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
        reference.save_pretrained(folder)  # the same start for all
        report("peft + bitsandbytes, nf4", reference, train, aside, peft_loss)
        for name, kind in (("smidgen, nf4", "nf4"), ("smidgen, 16 bits", None)):
            model = PeftModel.from_pretrained(ours(options, kind), folder, is_trainable=True, force=True)
            with fused(model, silent):
                report(name, model, train, aside, lambda model, batch: token_losses(model, batch)[0].mean())


def peft_loss(model: Any, batch: Batch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss


def report(name: str, model: Any, train: list[Batch], aside: list[list[int]], loss_of: Callable) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    model.train()  # also to evaluate: nothing is dropped, and a call in eval mode changes bitsandbytes' layers on a CPU
    before, begun = held_out(model, aside, loss_of), time.perf_counter()
    for batch in train:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    seconds = time.perf_counter() - begun
    print(f"{name:26} {before:.4f} -> {held_out(model, aside, loss_of):.4f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def held_out(model: Any, rows: list[list[int]], loss_of: Callable) -> float:
    losses = [loss_of(model, padded([row])).item() * (len(row) - 1) for row in rows]
    return sum(losses) / sum(len(row) - 1 for row in rows)


def padded(rows: list[list[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = (torch.arange(longest) < torch.tensor([[len(row)] for row in rows])).long()
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, 0] = IGNORED
    return Batch(ids, labels, mask, None, list(range(len(rows))), int((labels != IGNORED).sum()))


def large(options: argparse.Namespace) -> None:
    sizes = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    config = Qwen2Config(num_hidden_layers=28, vocab_size=151_936, tie_word_embeddings=True, **sizes)
    keep_freed(True)
    with PeakMemory(torch.device("cpu")) as memory, ExitStack() as stack:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        begun = time.perf_counter()
        quantize_model(model, quantization_config("nf4"))
        seconds, size = time.perf_counter() - begun, parameter_bytes(model) / 1e9
        print(f"{parameter_count(model) / 1e9:.2f}B parameters in {size:.2f} GB, quantised in {seconds:.0f} s")
        step = make_step("smidgen", model, Task(1, 1024, 0.05, options.checkpointing), stack)
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            step()
            times.append(time.perf_counter() - begun)
    print(f"1 x 1024: {1024 / statistics.median(times):.0f} tokens/s, peak {memory.peak / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("speed", "loss", "large"))
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    {"speed": speed, "loss": loss, "large": large}[options.what](options)


if __name__ == "__main__":
    main()
