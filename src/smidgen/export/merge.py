"""Merging an adapter into its base for good, with proof: the merged model must answer as the adapted one did.

Everything is computed in fp32, the update is added in fp32, and the result is cast once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smidgen.data import encode_prompt, encode_text
from smidgen.errors import MergeError, UsageError
from smidgen.models.generate import generate_batch
from smidgen.models.load import stop_token_ids
from smidgen.models.quantize import quantization_config, quantize_model
from smidgen.models.save import save_complete

# The largest change of a logit, in units of the spread of the logits, by the dtype that the weights are cast to.
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
ANSWER_TOKENS = 16
PROBES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Set a timer for ten minutes.",
    "Translate 'good morning' into Spanish.",
    "List three colours.",
    "Why is the sky blue?",
    "def add(a, b):",
    "Summarise: the cat sat on the mat and slept.",
)


@dataclass(frozen=True)
class Parity:
    """How a merged model answers compared with the adapted one.

    gap: the largest change of a logit; spread: the standard deviation of the logits; same: prompts whose greedy
    answer is the same in every token; bound: the largest gap that passes, in units of the spread.
    """

    prompts: int
    same: int
    gap: float
    spread: float
    bound: float

    @property
    def passed(self) -> bool:
        """Logits within the bound, and half of the greedy answers the same: rounding to 16 bits decides near-ties."""
        return self.gap <= self.bound * self.spread and 2 * self.same >= self.prompts

    def __str__(self) -> str:
        bound = f" (bound {self.bound * self.spread:.2g})" if math.isfinite(self.bound) else f" of {self.spread:.2g} sd"
        return (
            f"parity on {self.prompts} prompts: max |dlogit| {self.gap:.2g}{bound}, "
            f"same greedy tokens {self.same}/{self.prompts}"
        )


class Probe:
    """The greedy answers of an adapted model to fixed prompts, with their logits, to compare a merged model with."""

    def __init__(self, model: Any, tokenizer: Any):
        prompts = [_encode(text, tokenizer) for text in PROBES]
        answers = generate_batch(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS)
        self._rows = [(prompt + answer, len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
        self._expected = [_logits(model, *row) for row in self._rows]

    def compare(self, merged: Any, bound: float) -> Parity:
        """How `merged` answers to the same; `bound` as in `Parity`."""
        found = [_logits(merged, *row) for row in self._rows]
        pairs = list(zip(self._expected, found, strict=True))
        same = sum(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs)
        gap = max((a - b).abs().max().item() for a, b in pairs)
        return Parity(len(pairs), same, gap, torch.cat(self._expected).std().item(), bound)


def merge_to_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    say: Callable[[str], None] = print,
    quantize: str | None = None,
) -> Parity:
    """Merge the active adapters of `model` (in fp32) and write it as a plain Hugging Face model in `dtype`.

    A quantised base is made dense first: its weights as they were trained with, and the update.

    Args:
        quantize: store the merged model again, as nf4, fp4 or int8. What that changes is told, and not bounded:
            the update is rounded as coarsely as the weights.

    Raises:
        UsageError: the folder is not empty.
        MergeError: the merged model answers differently beyond the bound, cannot be merged, or cannot be written; the
            folder is as it was.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder}: is not empty; name another folder")
    probe = Probe(model, tokenizer)
    merged = model.merge_and_unload()
    with torch.no_grad():
        for tensor in (*merged.parameters(), *merged.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))  # what is compared is what is written
    parity = probe.compare(merged, BOUNDS[dtype])
    say(str(parity))
    if not parity.passed:
        raise MergeError(
            f"merge refused: the merged model does not answer as the adapted one ({parity}); nothing was written. "
            "Merge with --dtype float32, or serve the adapter beside its base"
        )
    merged = merged.to(dtype)
    if quantize is not None:
        quantize_model(merged, quantization_config(quantize, dtype=dtype))
        say(f"stored in {quantize}: {probe.compare(merged, math.inf)}")
    try:
        save_complete(merged, tokenizer, stop_token_ids(merged, tokenizer), folder)
    except OSError as error:
        raise MergeError(str(error)) from error
    return parity


def _encode(text: str, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template:
        return encode_prompt([{"role": "user", "content": text}], tokenizer)
    return encode_text(text, tokenizer)


@torch.no_grad()
def _logits(model: Any, row: list[int], prompt: int) -> Tensor:
    """The logits (T, V) from the last token of the prompt on: those that choose the answer."""
    ids = torch.tensor([row], device=model.device)
    return model(ids).logits[0, prompt - 1 :].float()
