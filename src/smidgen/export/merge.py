"""Merging an adapter into its base for good, with proof: the merged model must answer as the adapted one did.

Everything is computed in fp32, the update is added in fp32, and the result is cast once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from smidgen.adapters.config import TaskType
from smidgen.data import encode_prompt, encode_text
from smidgen.data.messages import MARK
from smidgen.data.task_rows import TaskBatch
from smidgen.errors import MergeError
from smidgen.models.fingerprint import fingerprint
from smidgen.models.generate import generate_batch
from smidgen.models.images import image_inputs, reader_of
from smidgen.models.lineage import Lineage, hashes, parents_of, weight_files
from smidgen.models.load import stop_token_ids
from smidgen.models.open import Place
from smidgen.models.quantize import quantization_config, quantize_model
from smidgen.models.save import check_empty, save_complete
from smidgen.models.tasks import recorded_batch, task_logits, task_of
from smidgen.proofs import RECORD_NAME

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
    answer is the same in every token; bound: the largest gap that passes, in units of the spread; what: is the same.
    """

    prompts: int
    same: int
    gap: float
    spread: float
    bound: float
    what: str = "greedy tokens"

    @property
    def passed(self) -> bool:
        """Logits within the bound, and half of the greedy answers the same: rounding to 16 bits decides near-ties."""
        return self.gap <= self.bound * self.spread and 2 * self.same >= self.prompts

    def __str__(self) -> str:
        bound = f" (bound {self.bound * self.spread:.2g})" if math.isfinite(self.bound) else f" of {self.spread:.2g} sd"
        return (
            f"parity on {self.prompts} prompts: max |dlogit| {self.gap:.2g}{bound}, "
            f"same {self.what} {self.same}/{self.prompts}"
        )


class Probe:
    """The answers of an adapted model to fixed texts, with their logits, to compare a merged model with.

    Of a language model these are the greedy ones; a model that takes images is asked about one too.
    """

    def __init__(self, model: Any, tokenizer: Any):
        task = task_of(model)
        self._what = "greedy tokens" if task == TaskType.CAUSAL_LM else "likeliest classes"
        if task == TaskType.CAUSAL_LM:
            self._answers = _greedy(model, tokenizer)
        else:
            encoded = [tokenizer(text)["input_ids"] for text in PROBES]
            # A decoder is shown the text itself.
            batches = [recorded_batch({"ids": ids, "second": [0] * len(ids), "labels": ids}) for ids in encoded]
            self._answers = [
                partial(_task_logits, batch=batch.to(model.device), task=task.lower()) for batch in batches
            ]
        self._expected = [answer(model) for answer in self._answers]

    def compare(self, merged: Any, bound: float) -> Parity:
        """How `merged` answers to the same; `bound` as in `Parity`."""
        found = [answer(merged) for answer in self._answers]
        pairs = list(zip(self._expected, found, strict=True))
        same = sum(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs)
        gap = max((a - b).abs().max().item() for a, b in pairs)
        spread = torch.cat([answer.flatten() for answer in self._expected]).std().item()
        return Parity(len(pairs), same, gap, spread, bound, self._what)


def merge_to_folder(
    model: Any,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    say: Callable[[str], None] = print,
    quantize: str | None = None,
    origin: Place | None = None,
) -> Parity:
    """Merge the active adapters of `model` (in fp32) and write it as a plain Hugging Face model in `dtype`.

    A quantised base is made dense first: its weights as they were trained with, and the update.

    Args:
        quantize: store the merged model again, as nf4, fp4 or int8. What that changes is told, and not bounded:
            the update is rounded as coarsely as the weights.
        origin: where base and adapter came from, to be recorded beside the model.

    Raises:
        UsageError: the folder is not empty.
        MergeError: the merged model answers differently beyond the bound, cannot be merged, or cannot be written; the
            folder is as it was.
    """
    check_empty(folder)
    probe, base = Probe(model, tokenizer), fingerprint(model)
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

    def record(partial: Path) -> None:
        if origin is not None:
            lineage = Lineage(
                parents_of(origin.base, origin.adapter, folder), None, {}, hashes(weight_files(partial), partial)
            )
            known = {"base": origin.base, "base_fingerprint": base, "fingerprint": fingerprint(merged)}
            (partial / RECORD_NAME).write_text(json.dumps(known | {"lineage": asdict(lineage)}), encoding="utf-8")

    try:
        save_complete(merged, tokenizer, stop_token_ids(merged, tokenizer), folder, record)
    except OSError as error:
        raise MergeError(str(error)) from error
    return parity


def _encode(text: str, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template:
        return encode_prompt([{"role": "user", "content": text}], tokenizer)
    return encode_text(text, tokenizer)


def _ask_about_image(model: Any, tokenizer: Any, scratch: Path) -> tuple[list[int], str] | None:
    """A prompt about an image, and its path; None where the model takes none, or the chat template."""
    reader = reader_of(model)
    if reader is None or not tokenizer.chat_template:
        return None
    ids = encode_prompt([{"role": "user", "content": f"{MARK}What is this?", "images": 1}], tokenizer)
    if ids.count(reader.token_id) != 1:
        return None
    path = reader.example(scratch)
    return reader.expand(ids, [], [path])[0], path


def _greedy(model: Any, tokenizer: Any) -> list[Callable[[Any], Tensor]]:
    """What gives the logits of any model where this one answers greedily."""
    prompts: list[list[int]] = [_encode(text, tokenizer) for text in PROBES]
    images: list[list[str]] = [[] for _ in prompts]
    with TemporaryDirectory() as scratch:
        if asked := _ask_about_image(model, tokenizer, Path(scratch)):
            prompts.append(asked[0])
            images.append([asked[1]])
        answers = generate_batch(model, tokenizer, prompts, max_new_tokens=ANSWER_TOKENS, images=images)
        seen = [image_inputs(model, paths) if paths else {} for paths in images]
    return [
        partial(_logits, row=prompt + answer, prompt=len(prompt), inputs=inputs)
        for prompt, answer, inputs in zip(prompts, answers, seen, strict=True)
    ]


@torch.no_grad()
def _task_logits(model: Any, batch: TaskBatch, task: str) -> Tensor:
    return task_logits(model, batch, task)[0].float()


@torch.no_grad()
def _logits(model: Any, row: list[int], prompt: int, inputs: dict[str, Tensor]) -> Tensor:
    """The logits (T, V) from the last token of the prompt on: those that choose the answer."""
    ids = torch.tensor([row], device=model.device)
    return model(ids, **inputs).logits[0, prompt - 1 :].float()
