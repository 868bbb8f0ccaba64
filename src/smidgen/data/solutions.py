"""Solutions in steps, each right or wrong, as tokens: what process rewards are learned from."""

from __future__ import annotations

import sys
from typing import Any

from smidgen.data.packing import IGNORED
from smidgen.data.tasks import STEP_LABELS, TaskExample
from smidgen.data.templates import choose_template
from smidgen.data.tokenise import Cuts, Encoded, Encoder, Left
from smidgen.errors import DataError


class SolutionEncoder:
    """Tokenises solutions: the prompt as the chat template writes it, then each step with a new line by itself.

    The last token of a step has its label, 1 where it is right; all others have -100.

    Args:
        tokenizer: a fast tokenizer of transformers.
        on_long: "drop" or "error"; else steps that do not fit are left out at the end.
        system: the system message of prompts that have none.

    Raises:
        DataError: the tokenizer is not a fast one.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = sys.maxsize, on_long: str = "error", system: str | None = None
    ):
        self.max_length, self.on_long, self.system = max_length, on_long, system
        self.template = choose_template(tokenizer, None, "plain")
        self.encoder = Encoder(tokenizer)
        self.cuts = Cuts()

    def encode(self, example: TaskExample) -> list[Encoded] | Left:
        """Tokenise a solution, or tell why there is none; without an answer all its steps count as wrong."""
        messages, steps = example.text, example.second
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        try:
            prompt = self.template.prompt(messages)
        except DataError as error:
            return Left(example.line, str(error))
        ids = self.encoder.with_bos(self.encoder.encode([prompt])[0].ids)
        labels = [IGNORED] * len(ids)
        wholes = [len(ids)]  # how long the row is after the prompt and after each step
        answers = example.answer or [None] * len(steps)
        for step, answer in zip(self.encoder.encode([f"{step}\n" for step in steps]), answers, strict=True):
            ids += step.ids
            labels += [IGNORED] * (len(step.ids) - 1) + [int(answer == STEP_LABELS[1])]
            wholes.append(len(ids))
        return self._fitted(example.line, ids, labels, wholes)

    def _fitted(self, line: int, ids: list[int], labels: list[int], wholes: list[int]) -> list[Encoded] | Left:
        if len(ids) > self.max_length:
            self.cuts.long += 1
            if self.on_long in ("drop", "error"):
                self.cuts.dropped += self.on_long == "drop"
                return Left(line, f"longer than max_length={self.max_length}", mistake=self.on_long == "error")
            end = max((whole for whole in wholes if whole <= self.max_length), default=0)
            if end <= wholes[0]:
                self.cuts.nothing_left += 1
                return Left(line, f"the prompt leaves no room for a step in max_length={self.max_length}")
            self.cuts.end_cut += 1
            self.cuts.tokens_lost += len(ids) - end
            ids, labels = ids[:end], labels[:end]
        return [Encoded(ids, [False] * len(ids), labels, [])]
