"""Text from a model: many prompts in batches, or one prompt as a stream.

Shapes: B rows, T tokens. Prompts come as token ids, rendered and tokenised by the data room.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from smidgen.models.images import image_inputs
from smidgen.models.load import stop_token_ids


def generate_batch(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: set[int] | None = None,
    images: Sequence[Sequence[str]] | None = None,
) -> list[list[int]]:
    """Answer for each prompt the new token ids, up to and without the first stop token, in the order of `prompts`.

    Prompts are computed `batch_size` at a time, like lengths together, padded on the left. `stop_ids` is
    `stop_token_ids` where not given. Greedy unless `do_sample`. `images` are the paths of each prompt's images, whose
    tokens stand in the prompts.
    """
    stops = stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids
    config = _config(tokenizer, stops, max_new_tokens, do_sample, temperature, top_p)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        with _evaluating(model):
            inputs = _left_padded([prompts[row] for row in rows], config.pad_token_id, model.device)
            if paths := [path for row in rows for path in images[row]] if images else []:
                inputs |= image_inputs(model, paths)
            output = model.generate(**inputs, generation_config=config)
        for row, ids in zip(rows, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            answers[row] = ids[:end]
    return answers


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: set[int] | None = None,
) -> Iterator[str]:
    """Yield the answer to `prompt` piece by piece as it is generated. Leaving the loop early ends the generation."""
    stops = stop_token_ids(model, tokenizer) if stop_ids is None else stop_ids
    config = _config(tokenizer, stops, max_new_tokens, do_sample, temperature, top_p)
    inputs = _left_padded([prompt], config.pad_token_id, model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    left = _Left()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with _evaluating(model):
                criteria = StoppingCriteriaList([left])
                model.generate(**inputs, generation_config=config, streamer=streamer, stopping_criteria=criteria)
        except BaseException as failure:  # told to the caller, whose thread waits for the next piece
            failures.append(failure)
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        left.event.set()
        worker.join()
    if failures:
        raise failures[0]


class _Left(StoppingCriteria):
    """Stops the generation once nobody reads it any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)  # type: ignore[arg-type]


def _config(
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_p: float,
) -> GenerationConfig:
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        num_beams=1,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        **sampling,
    )


def _left_padded(prompts: list[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Answer `input_ids` and `attention_mask`, both (B, T); the last token of each row stands at T - 1."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Generate without dropout, with the model's own generation defaults set aside; give both back."""
    training, defaults = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults
        model.train(training)
