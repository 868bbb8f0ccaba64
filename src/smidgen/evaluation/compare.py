"""The same held-out rows answered by the base model and by the tuned one: is the gain real?

Both get the same prompt. The base may also be told what to do in words (hard prompt), and be shown solved examples
first (few-shot), which is what one would try before any training. Rows are answered chunk by chunk and counted; nothing
but the counts and a few samples is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from smidgen.data.formats import Example, Message, convert_rows
from smidgen.data.images import ImageReader
from smidgen.data.read import data_files, read_rows
from smidgen.data.tokenise import encode_prompt
from smidgen.errors import DataError
from smidgen.evaluation.metrics import exact_match, paired_gain
from smidgen.models.generate import generate_batch
from smidgen.models.images import reader_of
from smidgen.models.load import stop_token_ids
from smidgen.proofs import wilson
from smidgen.recipe import Source


@dataclass(frozen=True)
class Sample:
    """One row: the request, the reference, and what each variant answered."""

    request: str
    reference: str
    answers: dict[str, str]


@dataclass
class Comparison:
    """Exact matches of the variants `base`, `hard prompt` and `few-shot` (if asked for) and `tuned` on the same rows.

    gained: rows that tuned has right and base (the best of its variants on a row) has wrong; lost: the reverse.
    """

    rows: int = 0
    right: dict[str, int] = field(default_factory=dict)
    gained: int = 0
    lost: int = 0
    samples: list[Sample] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What to tell the user; the last line is the summary."""
        lines = []
        for sample in self.samples:
            lines += [f"request: {sample.request}", f"  reference: {sample.reference}"]
            lines += [f"  {variant}: {_one_line(answer)}" for variant, answer in sample.answers.items()]
        for variant, right in self.right.items():
            low, high = wilson(right, self.rows)
            lines.append(
                f"{variant}: {right} of {self.rows} right (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"
            )
        gain, low, high = paired_gain(self.gained, self.lost, self.rows)
        lines.append(
            f"tuned against the base's better answer of each row: {100 * gain:+.1f} points "
            f"(95 % interval {100 * low:+.0f} to {100 * high:+.0f})"
        )
        percent = {variant: f"{100 * right / self.rows:.1f} %" for variant, right in self.right.items()}
        more = [f"{variant} {share}" for variant, share in percent.items() if variant not in ("base", "tuned")]
        base = f"base {percent['base']}" + (f" ({', '.join(more)})" if more else "")
        lines.append(f"exact match on {self.rows} held-out rows: {base} -> tuned {percent['tuned']}")
        return lines


def compare(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Example],
    *,
    few_shot: Sequence[Example] = (),
    hard_prompt: str | None = None,
    system: str | None = None,
    batch_size: int = 64,
    samples: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Answer the last turn of each example with the adapter on and off.

    Args:
        model: an adapted model; `model.disable_adapter()` gives the base.
        examples: chats that end with the assistant's turn, the reference.
        few_shot: solved examples that the base sees first, in a variant of its own.
        hard_prompt: a text that stands first in the system message of a base variant of its own.
        system: the system message of chats that have none.
        batch_size: rows generated at once; also the size of a chunk.
        samples: how many rows are kept to be shown.
        progress: gets a line after each chunk.

    Raises:
        DataError: there is no row, or one does not end with an assistant's text.
    """
    asked = {"base": True, "hard prompt": hard_prompt, "few-shot": few_shot, "tuned": True}
    found = Comparison(right={variant: 0 for variant, wanted in asked.items() if wanted})
    shots = [message for example in few_shot for message in (*_split(example)[0], example.messages[-1])]
    shots = [message for message in shots if message["role"] != "system"]
    shot_images = tuple(image for example in few_shot for image in example.images)
    reader, stops = reader_of(model), stop_token_ids(model, tokenizer)
    rows = iter(examples)
    while chunk := list(islice(rows, batch_size)):
        requests, references = map(list, zip(*map(_split, chunk), strict=True))
        longest = max(len(tokenizer.encode(reference, add_special_tokens=False)) for reference in references)
        answers: dict[str, list[str]] = {}
        for variant in found.right:
            before = shots if variant == "few-shot" else []
            images = [(*(shot_images if before else ()), *example.images) for example in chunk]
            first = hard_prompt if variant == "hard prompt" else None
            prompts = [encode_prompt(_prompt(request, before, system, first), tokenizer) for request in requests]
            prompts = [_with_images(*row, reader) for row in zip(chunk, prompts, images, strict=True)]
            with nullcontext() if variant == "tuned" else model.disable_adapter():
                # Some room for other white space; what is longer still cannot match.
                room = longest + 8
                ids = generate_batch(
                    model, tokenizer, prompts, max_new_tokens=room, batch_size=batch_size, stop_ids=stops, images=images
                )
            answers[variant] = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in ids]
        _count(found, requests, references, answers, samples)
        if progress:
            progress(f"{found.rows} rows: " + ", ".join(f"{variant} {right}" for variant, right in found.right.items()))
    if not found.rows:
        raise DataError("evaluation: the data hold no rows")
    return found


def read_examples(source: Source, limit: int | None = None) -> Iterator[Example]:
    """Yield the examples of a data file, file by file; a file that holds wrong rows raises DataError, naming them."""
    for path in data_files(source.path):
        rows = islice(read_rows(path), limit)
        yield from convert_rows(str(path), rows, format=None, columns=source.columns).examples


def choose_few_shot(source: Source, count: int, *, seed: int) -> list[Example]:
    """Answer `count` examples of a file, drawn with a seed."""
    return random.Random(seed).sample(examples := list(read_examples(source)), min(count, len(examples)))


def _split(example: Example) -> tuple[list[Message], str]:
    """Answer an example's messages up to the last answer, and that answer."""
    last = example.messages[-1] if example.messages else {}
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise DataError(f"evaluation: line {example.line}: there is no assistant's text at the end to compare with")
    return example.messages[:-1], last["content"]


def _with_images(example: Example, prompt: list[int], images: Sequence[str], reader: ImageReader | None) -> list[int]:
    """The prompt with the tokens of its images."""
    if reader is None and images:
        raise DataError(f"evaluation: line {example.line}: the row has images, and the model takes none")
    return reader.expand(prompt, [], images)[0] if reader else prompt


def _prompt(
    request: list[Message], before: list[Message], system: str | None, hard_prompt: str | None
) -> list[Message]:
    """Put the few-shot turns, if any, between the system message, which the hard prompt begins, and the request."""
    if request[0]["role"] == "system":
        system, request = request[0]["content"], request[1:]
    told = "\n".join(filter(None, (hard_prompt, system)))
    return [*([{"role": "system", "content": told}] if told else []), *before, *request]


def _count(
    found: Comparison, requests: list[list[Message]], references: list[str], answers: dict[str, list[str]], samples: int
) -> None:
    for row, (request, reference) in enumerate(zip(requests, references, strict=True)):
        given = {variant: texts[row] for variant, texts in answers.items()}
        match = {variant: exact_match(answer, reference) for variant, answer in given.items()}
        for variant, right in match.items():
            found.right[variant] += right
        base = any(right for variant, right in match.items() if variant != "tuned")
        found.gained += match["tuned"] and not base
        found.lost += base and not match["tuned"]
        found.rows += 1
        if len(found.samples) < samples:
            found.samples.append(Sample(request[-1]["content"], reference, given))


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else line[:157] + "..."
