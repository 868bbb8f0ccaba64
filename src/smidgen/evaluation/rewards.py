"""Scores of reward models, and how well they tell the better answer from the worse.

Letters: N pairs, or steps of all solutions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from smidgen.data.audit import lengths_of
from smidgen.data.formats import FORMATS, Example, FileRows, Tally, convert_rows
from smidgen.data.messages import BadRow, Unusable
from smidgen.data.preference import PAIRS, Pair, answer_example
from smidgen.data.preference_rows import pair_pieces
from smidgen.data.read import data_files, read_rows
from smidgen.data.rows import TokenRow
from smidgen.data.solutions import SolutionEncoder
from smidgen.data.task_rows import TaskRow
from smidgen.data.tasks import STEP_LABELS, TASK_FORMATS, TaskExample, read_prompt
from smidgen.data.templates import choose_template
from smidgen.data.tokenise import Left, Piece, Tokeniser
from smidgen.errors import DataError, UsageError, raise_all
from smidgen.evaluation.metrics import calibration_error
from smidgen.models.load import stop_token_ids
from smidgen.models.open import find, open_model
from smidgen.models.rewards import kind_of_reward, score_rows, score_steps
from smidgen.proofs import wilson
from smidgen.recipe import Recipe, Source

_ANSWERS = {name: format for name, format in FORMATS.items() if format.style != "text"}  # those that end in an answer

Say = Callable[[str], None]


class Scorer:
    """Scores answers, or the steps of solutions.

    Args:
        model: a reward model, as `open_model` answers it.
        recipe: of its training: it says how long rows may be, and the system message; None: as long as they are.

    Raises:
        UsageError: the model is no reward model.
    """

    def __init__(self, model: Any, tokenizer: Any, recipe: Recipe | None = None) -> None:
        self.kind = kind_of_reward(model)
        if self.kind is None:
            raise UsageError("the model is no reward model; 'objective: reward' trains one")
        self.model, self.tokenizer = model, tokenizer
        self.system = recipe.data.system if recipe else None
        limit = (recipe.data.max_length, recipe.data.on_long) if recipe else (sys.maxsize, "error")
        if self.kind == "process_reward":
            self._solutions = SolutionEncoder(tokenizer, *limit, self.system)
            return
        self.tokeniser = Tokeniser(
            tokenizer,
            choose_template(tokenizer, None, "alpaca"),
            stop_ids=stop_token_ids(model, tokenizer),
            learn_all=False,
            max_length=limit[0],
            on_long=limit[1],
        )

    def score(self, rows: Sequence[Any]) -> list[Any]:
        """A score for each row: the higher, the better; only differences between answers to one prompt mean something.

        Args:
            rows: chats (lists of messages that end with the assistant's), or pairs of a prompt, a text or messages, and
                an answer; for a process reward model the answer is a list of steps.

        Returns:
            A float for each row; for a process reward model a list of floats, one for each step, the logit that it is
            right; steps that do not fit into the training's `max_length` have none.

        Raises:
            DataError: rows are wrong or too long, each told by its number, from 1.
        """
        examples, wrong = [], Tally()
        for number, row in enumerate(rows, 1):
            try:
                examples.append(self._example(number, row))
            except (BadRow, Unusable) as problem:
                wrong.add(str(problem), str(number))
        raise_all(DataError, wrong.problems("row"))
        scores = [score for score in self.score_examples(examples)]
        for found in scores:
            if isinstance(found, Left):
                wrong.add(found.reason, str(found.line))
        raise_all(DataError, wrong.problems("row"))
        return scores

    def _example(self, number: int, row: Any) -> Example | TaskExample:
        is_pair = isinstance(row, tuple) and len(row) == 2
        if not is_pair and not (isinstance(row, list) and self.kind == "reward"):
            raise BadRow("must be a prompt with an answer" + ", or a list of messages" * (self.kind == "reward"))
        prompt, answer = row if is_pair else (row[:-1], row[-1:])
        messages = read_prompt(prompt)
        if self.kind == "process_reward":
            if not isinstance(answer, list) or not all(isinstance(step, str) and step.strip() for step in answer):
                raise BadRow("the answer must be a list of texts, the steps")
            return TaskExample(number, messages, answer, None)
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        turns = read_prompt(answer)
        if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
            raise Unusable("empty answer, or no turn of the assistant at the end")
        return answer_example(number, self._with_system(messages), turns, None)

    def _with_system(self, messages: list[Any]) -> list[Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return messages if messages[0]["role"] == "system" else [*system, *messages]

    def score_examples(self, examples: Sequence[Any]) -> list[Any]:
        """The score of each example, of each side of a pair, or of each step, in order; `Left`: why it has none."""
        if self.kind == "process_reward":
            return [self._steps(self._solutions.encode(example)) for example in examples]
        if examples and isinstance(examples[0], Pair):
            pairs = [pair._replace(prompt=self._with_system(pair.prompt)) for pair in examples]
            pieces = list(chain.from_iterable(pair_pieces(self.tokeniser, pairs)))
        else:
            pieces = list(chain.from_iterable(self.tokeniser.pieces(examples)))
        rows = [_row(piece) for piece in pieces if isinstance(piece, Piece)]
        scores = iter(score_rows(self.model, rows, self.tokenizer.pad_token_id))
        return [next(scores) if isinstance(piece, Piece) else piece for piece in pieces]

    def _steps(self, encoded: Any) -> list[float] | Left:
        if isinstance(encoded, Left):
            return encoded
        arrays = [np.array(values, dtype=np.int64) for values in (encoded[0].ids, encoded[0].second, encoded[0].labels)]
        return score_steps(self.model, TaskRow(*arrays, where=""))


def _row(piece: Piece) -> TokenRow:
    ids = np.array(piece.ids, dtype=np.int64)
    return TokenRow(ids, np.zeros(len(ids), dtype=bool), str(piece.line))


def load_scorer(run: str | Path, *, base: str | None = None, dtype: str | None = None, say: Say = print) -> Scorer:
    """Load a reward model as a scorer.

    Args:
        run: a run folder, an adapter folder, or a merged model.
        base: the base model, where it is no longer where the run says.
        dtype: of the base weights; None: as in the run.

    Raises:
        UsageError: it is no reward model.
        AdapterFileError: its head is missing, or it does not fit the base.
    """
    place = find(run, base)
    return Scorer(*open_model(place, dtype, say=say), place.recipe)


# ---- files ----


@dataclass
class Scored:
    """What became of the rows of some files.

    pairs: with `scores` (N, 2), of the chosen and the rejected answer.
    steps: (N, 2), the score and whether the step is right.
    left: rows without a score, by reason.
    """

    rows: int = 0
    pairs: list[Pair] = field(default_factory=list)
    scores: list[tuple[float, float]] = field(default_factory=list)
    steps: list[tuple[float, bool]] = field(default_factory=list)
    left: Tally = field(default_factory=Tally)

    def lines(self) -> list[str]:
        """What to tell; the last line is the summary."""
        lines = [f"{len(places):,} rows left out: {reason}" for reason, places in self.left.lines.items()]
        if self.pairs:
            chosen, rejected = np.array(self.scores).T
            lengths = lengths_of(self.pairs)
            assert lengths is not None
            lines.append(f"margin: mean {np.mean(chosen - rejected):.3f}; scores: mean {np.mean(self.scores):.3f}")
            lines.append(f"to take the longer answer is right in {lengths.accuracy(True):.1%}")
            lines += _accuracy(chosen - rejected, np.ones(len(chosen), dtype=bool), "pairs")
        elif self.steps:
            scores, right = np.array(self.steps).T
            share = max(right.mean(), 1 - right.mean())
            lines.append(f"always the same verdict is right in {share:.1%}")
            lines += _accuracy(scores, right > 0, f"steps of {self.rows:,} solutions")
        else:
            lines.append(f"scored: {self.rows:,} rows")
        return lines


def _accuracy(logits: np.ndarray, right: np.ndarray, what: str) -> list[str]:
    """How often the sign of logits is right, and how far their certainty is from that."""
    hits = (logits > 0) == right
    low, high = wilson(int(hits.sum()), len(hits))
    error = calibration_error(1 / (1 + np.exp(-np.abs(logits))), hits)
    return [
        f"expected calibration error {error:.3f} (10 bins)",
        f"accuracy on {len(hits):,} {what}: {hits.mean():.1%} (95 % interval {low:.1%} to {high:.1%})",
    ]


def score_files(
    scorer: Scorer, sources: Sequence[Source], found: Scored, limit: int | None = None, progress: Say | None = None
) -> Iterator[dict[str, Any]]:
    """Score the rows of files: pairs, answers, or solutions for a process reward model.

    Args:
        found: gets what became of them.

    Yields:
        A line for each row: its file and line, and `chosen` and `rejected`, `score`, or `scores` of its steps.

    Raises:
        DataError: files or rows are wrong.
    """
    formats = TASK_FORMATS["process_reward"] if scorer.kind == "process_reward" else {**PAIRS, **_ANSWERS}
    for source in sources:
        for path in data_files(source.path):
            rows = islice(read_rows(path), limit)
            file = convert_rows(str(path), rows, format=None, columns=source.columns, formats=formats)
            for reason, lines in file.unusable.lines.items():
                found.left.lines.setdefault(reason, []).extend(lines)
            yield from _score_file(scorer, file, found, progress)


def _score_file(scorer: Scorer, file: FileRows, found: Scored, progress: Say | None) -> Iterator[dict[str, Any]]:
    many = file.format.name in PAIRS
    examples: list[Any] = list(chain.from_iterable(file.examples)) if many else file.examples
    for start in range(0, len(examples), 256):
        part = examples[start : start + 256]
        scores = iter(scorer.score_examples(part))
        for example in part:
            line = {"file": file.path, "line": example.line}
            score = next(scores)
            if isinstance(score, Left):
                found.left.add(score.reason, str(score.line))
                continue
            found.rows += 1
            if isinstance(example, Pair):
                other = next(scores)
                found.pairs.append(example)
                found.scores.append((score, other))
                yield line | {"chosen": score, "rejected": other}
            elif isinstance(example, TaskExample):
                right = [name == STEP_LABELS[1] for name in example.answer]
                found.steps += zip(score, right)
                yield line | {"scores": score}
            else:
                yield line | {"score": score}
        if progress and len(examples) > 1024:
            progress(f"{min(start + 256, len(examples)):,} of {len(examples):,}")
