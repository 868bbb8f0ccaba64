"""Rows with labels: what classifying, tagging, question answering and rewriting are learned from.

The tasks are named as in Hugging Face's adapter files, in small letters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from smidgen.data.formats import FileRows, Format, Tally, convert_rows
from smidgen.data.messages import (
    BadRow,
    Message,
    Unusable,
    add_system,
    kind_of,
    optional_text,
    read_message,
    text_of,
)
from smidgen.data.mixing import held_out
from smidgen.data.read import data_files, read_rows
from smidgen.errors import DataError, raise_all
from smidgen.foreign import shown
from smidgen.recipe import DataRecipe, Source

_MOST_LABELS = 100_000
STEP_LABELS = ("wrong", "right")  # what a step of a solution may be


class TaskExample(NamedTuple):
    """One row of data.

    line: its place in the file.
    text: the text; for tagging its words, for question answering the question, for solutions the prompt's messages.
    second: the other text of a pair, the context of a question, or the steps of a solution; None: there is none.
    answer: the name of its label (seq_cls), a name for each word (token_cls) or step (process_reward), the places of
        the right answers in the context, (first character, end), none where it has no answer (question_ans), the text
        to write (seq_2_seq_lm).
    """

    line: int
    text: Any
    second: Any
    answer: Any


def _classified(line: int, row: Mapping[str, Any]) -> TaskExample:
    text, second = _filled(row, "text"), optional_text(row, "text_pair") or None
    return TaskExample(line, text, second, _name(row.get("label"), "no label: field 'label'"))


def _tagged(tags: str) -> Format:
    def convert(line: int, row: Mapping[str, Any]) -> TaskExample:
        words, names = _list(row, "tokens"), _list(row, tags)
        if not all(isinstance(word, str) for word in words):
            raise BadRow("field 'tokens' must be a list of texts")
        if len(words) != len(names):
            raise BadRow(f"{len(words)} tokens, but {len(names)} {tags}; each token needs one")
        if not words:
            raise Unusable("no tokens")
        return TaskExample(line, words, None, [_name(name, f"no label: a value of '{tags}'") for name in names])

    return Format(f"tokens/{tags}", ("tokens", tags), (), "text", convert)


def _asked(line: int, row: Mapping[str, Any]) -> TaskExample:
    question, context, answers = _filled(row, "question"), _filled(row, "context"), row.get("answers")
    if not isinstance(answers, dict):
        raise BadRow(f"no label: field 'answers' must be an object with text and answer_start, got {kind_of(answers)}")
    texts, starts = _list(answers, "text"), _list(answers, "answer_start")
    if len(texts) != len(starts):
        raise BadRow("field 'answers' must have as many answer_start as text")
    for text, start in zip(texts, starts):
        if not (isinstance(text, str) and text and isinstance(start, int) and start >= 0):
            raise BadRow("field 'answers' must hold texts and the numbers of their first characters")
        if context[start : start + len(text)] != text:
            raise BadRow("the context does not have the text of 'answers' at answer_start")
    return TaskExample(line, question, context, [(start, start + len(text)) for text, start in zip(texts, starts)])


def _rewritten(line: int, row: Mapping[str, Any]) -> TaskExample:
    target = row.get("target")
    if not isinstance(target, str) or not target.strip():
        raise BadRow("no label: field 'target' is missing or empty")
    return TaskExample(line, _filled(row, "source"), None, target)


def _solved(line: int, row: Mapping[str, Any]) -> TaskExample:
    steps, labels = _list(row, "completions"), _list(row, "labels")
    if not all(isinstance(step, str) for step in steps):
        raise BadRow("field 'completions' must be a list of texts, the steps")
    if not all(label in (0, 1) for label in labels):  # true and false too
        raise BadRow("field 'labels' must be a list of true and false")
    if len(steps) != len(labels):
        raise BadRow(f"{len(steps)} steps, but {len(labels)} labels; each step needs one")
    if not steps or not all(step.strip() for step in steps):
        raise Unusable("empty step" if steps else "no steps")
    prompt = read_prompt(row.get("prompt"))
    add_system(prompt, row)
    return TaskExample(line, prompt, steps, [STEP_LABELS[int(label)] for label in labels])


def read_prompt(value: Any) -> list[Message]:
    """The prompt of a solution or an answer, a text or messages, as messages."""
    if isinstance(value, str) and not value.strip():
        raise Unusable("empty prompt")
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"field 'prompt' must be text or messages, got {kind_of(value)}")
    return [read_message(f"prompt[{index}]", turn) for index, turn in enumerate(turns)]


TASK_FORMATS: dict[str, dict[str, Format]] = {
    task: {format.name: format for format in formats}
    for task, formats in {
        "seq_cls": (Format("text/label", ("text", "label"), ("text_pair",), "text", _classified),),
        "token_cls": (_tagged("tags"), _tagged("ner_tags")),
        "question_ans": (Format("question/context/answers", ("question", "context", "answers"), (), "text", _asked),),
        "process_reward": (
            Format("prompt/completions/labels", ("prompt", "completions", "labels"), ("system",), "plain", _solved),
        ),
        "seq_2_seq_lm": (Format("source/target", ("source", "target"), (), "text", _rewritten),),
    }.items()
}


@dataclass(frozen=True)
class TaskFiles:
    """The rows of a run's files, not tokenised yet.

    labels: the names of the training rows' labels in their order; none for tasks that have no fixed labels.
    """

    train: list[FileRows]
    eval: list[FileRows] | None
    labels: tuple[str, ...]


def read_task(data: DataRecipe, task: str, seed: int) -> TaskFiles:
    """Read the data of a recipe.

    Raises:
        DataError: files or rows are wrong, a row has no label, or all rows have the same one.
    """
    train = read_files(data.train, task, data.limit)
    held: list[FileRows] | None = read_files(data.eval, task, data.limit) if data.eval else None
    if data.eval_size is not None:
        train, held = _split(train, data.eval_size, seed)
    labels = sorted_names(chain.from_iterable(map(names_of, _examples(train)))) if has_labels(task) else ()
    if has_labels(task) and not 2 <= len(labels) <= _MOST_LABELS:
        raise DataError(f"data.train: {len(labels):,} different labels ({shown(', '.join(labels[:3]))}); 2 are needed")
    return TaskFiles(train, held, labels)


def read_files(sources: Sequence[Source], task: str, limit: int | None = None) -> list[FileRows]:
    """Read the rows of some files; what is wrong with each is told at once.

    Raises:
        DataError: files or rows are wrong, or a row has no label.
    """
    found, problems = [], []
    for source in sources:
        for path in data_files(source.path):
            rows = islice(read_rows(path), limit)
            formats = TASK_FORMATS[task]
            try:
                found.append(convert_rows(str(path), rows, format=None, columns=source.columns, formats=formats))
            except DataError as error:
                problems.append(str(error))
    raise_all(DataError, problems)
    return found


def has_labels(task: str) -> bool:
    """Whether the answers of a task are among a few names."""
    return task in ("seq_cls", "token_cls", "process_reward")


def names_of(example: TaskExample) -> list[str]:
    """The names of the labels of a row."""
    return [example.answer] if isinstance(example.answer, str) else example.answer


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """The different names, sorted: numbers as numbers, where all are."""
    different = set(names)
    return tuple(sorted(different, key=int if all(name.isdecimal() for name in different) else str))


def _examples(files: Sequence[FileRows]) -> list[TaskExample]:
    return [example for file in files for example in file.examples]


def _split(files: list[FileRows], size: float | int, seed: int) -> tuple[list[FileRows], list[FileRows]]:
    places = [(number, at) for number, file in enumerate(files) for at in range(len(file.examples))]
    kept, held = held_out(len(places), size, seed=seed)
    if not len(kept):
        raise DataError(f"data.eval_size: {size} leaves none of {len(places):,} rows to train on")
    parts = []
    for chosen in (kept, held):
        mine: list[list[TaskExample]] = [[] for _ in files]
        for number, at in (places[index] for index in sorted(chosen.tolist())):
            mine[number].append(files[number].examples[at])
        parts.append(mine)
    train = [replace(file, examples=part) for file, part in zip(files, parts[0])]
    return train, [replace(file, examples=part, unusable=Tally()) for file, part in zip(files, parts[1]) if part]


# ---- fields ----


def _filled(row: Mapping[str, Any], name: str) -> str:
    text = text_of(row, name)
    if not text.strip():
        raise Unusable(f"empty {name}")
    return text


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        raise BadRow(f"field '{name}' must be a list, got {kind_of(value)}")
    return value


def _name(value: Any, what: str) -> str:
    if value is None or value == "":
        raise BadRow(f"{what} is missing or empty")
    if not isinstance(value, str | int):
        raise BadRow(f"{what} must be text or a whole number, got {kind_of(value)}")
    return str(value)
