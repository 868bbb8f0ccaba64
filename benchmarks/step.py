"""One step of LoRA on a CPU: peft as it is used, smidgen on plain PyTorch, and smidgen with its kernels.

    python benchmarks/step.py --model FOLDER --rows 4 --length 512 --dropout 0.05 --repeat 5

The variants take turns in one process, so that a change of the machine's speed meets all; the medians are compared.
Peak memory is that of a process of its own for each variant. The limit is 4 FLOP for each weight and token (forward,
and the gradient of the inputs) at the speed of a large product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from smidgen import LoraConfig, get_peft_model, kernels
from smidgen.data.packing import IGNORED, Batch
from smidgen.kernels.native import forget
from smidgen.models.fuse import fused
from smidgen.models.scores import token_losses
from smidgen.training.memory import PeakMemory

VARIANTS = ("peft", "plain", "smidgen")
RANK, ALPHA = 8, 16


def make(variant: str, options: argparse.Namespace, stack: ExitStack) -> Callable[[], float]:
    """A function that makes one step and answers the loss."""
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    targets = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and "layers" in name]
    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": options.dropout}
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (options.rows, options.length), generator=torch.Generator().manual_seed(1))
    if variant == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**settings, target_modules=targets, task_type="CAUSAL_LM"))
        if options.checkpointing:
            model.enable_input_require_grads()
        loss = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    else:
        model = get_peft_model(
            model, LoraConfig(**settings, target_modules=sorted({t.rpartition(".")[2] for t in targets}))
        )
        labels = ids.clone()
        labels[:, 0] = IGNORED
        batch = Batch(ids, labels, None, None, list(range(options.rows)), options.rows * (options.length - 1))
        use(variant)
        if variant == "smidgen":
            stack.enter_context(fused(model))
        loss = lambda: token_losses(model, batch)[0].mean()  # noqa: E731
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=variant != "peft")

    def step() -> float:
        use(variant)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def use(variant: str) -> None:
    """Let the kernels of this variant run."""
    chosen = "reference" if variant == "plain" else os.environ.get("STEP_KERNELS", "")
    if os.environ.get("SMIDGEN_KERNELS", "") != chosen:
        os.environ["SMIDGEN_KERNELS"] = chosen
        forget()


def product_speed(dtype: torch.dtype) -> float:
    """FLOP a second of a large product, the best of some."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begun)
    return 2 * 2048**3 / best


def alone(variant: str, options: argparse.Namespace) -> None:
    """In a process of its own: two steps, and the most memory they took."""
    with ExitStack() as stack, PeakMemory(torch.device("cpu")) as memory:
        step = make(variant, options, stack)
        for _ in range(2):
            step()
    print(json.dumps({"peak": memory.peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--alone", choices=VARIANTS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options)
        return
    seconds: dict[str, list[float]] = {variant: [] for variant in options.variants}
    losses = {}
    shape = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    weights = sum(parameter.numel() for parameter in shape.parameters())
    del shape
    with ExitStack() as stack:
        steps = {variant: make(variant, options, stack) for variant in options.variants}
        for variant, step in steps.items():
            losses[variant] = step()  # warms up
        speeds = []
        for _ in range(options.repeat):
            for variant, step in steps.items():
                begun = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - begun)
            speeds.append(product_speed(getattr(torch, options.dtype)))
    tokens, first = options.rows * options.length, statistics.median(seconds[options.variants[0]])
    print(
        f"{kernels.chosen()}; product {statistics.median(speeds) / 1e9:.0f} GFLOP/s; {torch.get_num_threads()} threads"
    )
    print(f"{'variant':10} {'tokens/s':>9} {'ratio':>6} {'share of limit':>15} {'peak MB':>8} {'first loss':>11}")
    for variant in options.variants:
        median = statistics.median(seconds[variant])
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", variant]
        found = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.splitlines()[-1]
        share = f"{4 * weights * tokens / median / statistics.median(speeds):15.1%}"
        peak = json.loads(found)["peak"] / 1e6
        print(f"{variant:10} {tokens / median:9.0f} {first / median:6.2f} {share} {peak:8.0f} {losses[variant]:11.4f}")


if __name__ == "__main__":
    main()
