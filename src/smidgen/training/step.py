"""One step of LoRA, made in several ways that take turns: what `smidgen bench` and benchmarks/step.py measure.

plain is smidgen on plain PyTorch, smidgen has the kernels under the model, and peft is that library as it is used,
where it is installed. All train the same tensors of the same model on the same random tokens.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen import kernels
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.data.packing import IGNORED, Batch
from smidgen.models.fuse import fused
from smidgen.models.peft_model import get_peft_model
from smidgen.models.scores import token_losses, vocabulary_size
from smidgen.training.memory import PeakMemory, give_back, held, keep_freed

VARIANTS = ("peft", "plain", "smidgen")
RANK, ALPHA = 8, 16
_SIZE = 2048  # of the matrices whose product is the measure of speed
_KERNELS = "SMIDGEN_KERNELS"
_ASKED = os.environ.get(_KERNELS, "")

Step = Callable[[], float]  # makes one step, answers the loss


@dataclass(frozen=True)
class Task:
    """What a step computes: a batch of `rows` x `length` tokens, LoRA with this dropout."""

    rows: int
    length: int
    dropout: float
    checkpointing: bool = False


@dataclass(frozen=True)
class Result:
    """What the steps of a variant took.

    share: of the limit, which is 4 FLOP for each weight and token (forward, and the gradient of the inputs) at the
    speed of a large product. peak: bytes that its first step took beside the model.
    """

    tokens_per_second: float
    share: float
    peak: int
    first_loss: float


def available(device: torch.device) -> list[str]:
    """The variants that can be compared here."""
    native = device.type == "cpu" and kernels.instruction_set() != "reference"
    return [*["peft"] * bool(importlib.util.find_spec("peft")), "plain", *["smidgen"] * native]


def make_step(variant: str, model: Any, task: Task, stack: ExitStack, say: Callable[[str], None] = print) -> Step:
    """Attach LoRA to all linear layers of the model's blocks, and answer its step; `stack` keeps kernels in place."""
    if task.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    targets = sorted({name.rpartition(".")[2] for name in linear})
    settings: Any = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": task.dropout, "target_modules": targets}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary_size(model), (task.rows, task.length), generator=generator).to(model.device)
    torch.manual_seed(0)
    if variant == "peft":
        import peft

        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it asks transformers by old names
            model = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
        if task.checkpointing:
            model.enable_input_require_grads()
        loss: Callable[[], Tensor] = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    else:
        model = get_peft_model(model, LoraConfig(**settings))
        labels = ids.clone()
        labels[:, 0] = IGNORED
        batch = Batch(ids, labels, None, None, list(range(task.rows)), task.rows * (task.length - 1))
        use(variant)
        stack.enter_context(fused(model, say))
        loss = lambda: token_losses(model, batch)[0].mean()  # noqa: E731
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
    """Let the kernels of a variant run: those that the environment asked for at first, or plain PyTorch.

    Freed memory is kept as a run of ours keeps it, for peft as it is by itself.
    """
    keep_freed(variant != "peft")
    chosen = "reference" if variant == "plain" else _ASKED
    if os.environ.get(_KERNELS, "") != chosen:
        os.environ[_KERNELS] = chosen
        kernels.forget()


def product_speed(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP a second of a large product, the best of some."""
    a, b = (torch.randn(_SIZE, _SIZE).to(device, dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * _SIZE**3 / best


def compare(steps: Mapping[str, Step], model: nn.Module, task: Task, repeat: int) -> tuple[dict[str, Result], float]:
    """Let the steps take turns `repeat` times, after one each that warms up; answer medians, and a product's speed.

    Args:
        model: the one whose weights count for the limit; its dtype and device are those of the product.
    """
    parameter = next(model.parameters())
    device, weights = parameter.device, sum(p.numel() for p in model.parameters() if not p.requires_grad)
    losses, peaks = {}, {}
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for variant, step in steps.items():
        give_back()
        before = held(device)
        with PeakMemory(device) as memory:
            losses[variant] = step()
        peaks[variant] = memory.peak - before
    speeds: list[float] = []
    for _ in range(repeat):
        for variant, step in steps.items():
            begun = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - begun)
        speeds.append(product_speed(parameter.dtype, device))
    use("smidgen")
    speed, tokens = statistics.median(speeds), task.rows * task.length
    results = {}
    for variant, taken in seconds.items():
        rate = tokens / statistics.median(taken)
        results[variant] = Result(rate, 4 * weights * rate / speed, peaks[variant], losses[variant])
    return results, speed


def table(results: Mapping[str, Result]) -> Sequence[str]:
    """The results as lines; ratios are to the first."""
    first = next(iter(results.values())).tokens_per_second
    lines = [f"{'variant':10} {'tokens/s':>9} {'ratio':>6} {'share of limit':>15} {'peak MB':>8} {'first loss':>11}"]
    for variant, found in results.items():
        rate = f"{found.tokens_per_second:9.0f} {found.tokens_per_second / first:6.2f} {found.share:15.1%}"
        lines.append(f"{variant:10} {rate} {found.peak / 1e6:8.0f} {found.first_loss:11.4f}")
    return lines
