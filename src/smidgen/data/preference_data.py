"""From the data part of a recipe to tokenised preferences: read, audited, checked and accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from smidgen.data import check
from smidgen.data.audit import Audit, audit_preferences
from smidgen.data.check import DataReport, SetReport, Size
from smidgen.data.formats import Example, FileRows, Tally, named_format
from smidgen.data.messages import Message
from smidgen.data.mixing import held_out
from smidgen.data.preference import LABELLED, PAIRS, Labelled, Pair, chat_key, read_preferences
from smidgen.data.preference_rows import (
    LabelledRows,
    PairRows,
    label_pieces,
    labelled_example,
    mismatch,
    pair_examples,
    pair_pieces,
)
from smidgen.data.prepare import Progress, check_eval, make_rows, no_garbage_collection, prompt_style
from smidgen.data.read import data_files, read_rows
from smidgen.data.templates import ChatTemplate, choose_template
from smidgen.data.tokenise import Tokeniser
from smidgen.errors import DataError, raise_all
from smidgen.recipe import DataRecipe, Source


@dataclass(frozen=True)
class Preferences:
    """What training needs of preference data.

    train, eval: `PairRows`, or `LabelledRows` where labelled rows were asked for.
    template: the exact text of the chat template that was used.
    """

    train: PairRows | LabelledRows
    eval: PairRows | LabelledRows | None
    report: DataReport
    audit: Audit
    template: str


def prepare_preferences(
    data: DataRecipe,
    tokenizer: Any,
    *,
    labelled: bool = False,
    seed: int = 42,
    stop_ids: set[int],
    progress: Progress | None = None,
) -> Preferences:
    """Read, audit and tokenise preference data.

    `data.eval_size` counts prompts: rows whose chats begin with the same message stay together.

    Args:
        tokenizer: a fast tokenizer of transformers.
        labelled: rows are single answers with a label, not pairs.
        seed: for what is held out.
        stop_ids: the tokens at which the model stops.
        progress: gets a line about once a second.

    Raises:
        DataError: files or rows are wrong, sources have weights, or no token would be learned, or no stop token.
    """
    check_eval(data)
    if weighted := [source.path for source in data.train if source.weight is not None]:
        raise DataError(f"data.train: preferences are not mixed by weight; leave it out for {', '.join(weighted)}")
    if data.train_on == "all":
        raise DataError("data.train_on: of preferences the answers alone are learned; leave it at 'completion'")
    files = _read(data, data.train, labelled)
    held = _read(data, data.eval, labelled) if data.eval else []
    if data.eval_size is not None:
        files, held = _split(files, data.eval_size, seed)
    template = choose_template(tokenizer, data.template, prompt_style([*files, *held]))
    train, train_report = _tokenise(files, data, labelled, tokenizer, template, stop_ids, progress)
    evaluation, eval_report = None, None
    if held:
        evaluation, eval_report = _tokenise(held, data, labelled, tokenizer, template, stop_ids, progress)
    found = audit_preferences(files, held)
    report = DataReport(
        template=template.origin,
        max_length=data.max_length,
        train=train_report,
        eval=eval_report,
        train_size=_size(train),
        eval_size=_size(evaluation) if evaluation is not None else None,
        duplicates=0,  # the audit tells duplicates and overlap
        overlap=0,
        histogram=check.histogram(train.rows.lengths),
        samples=check.samples(train.rows, tokenizer),
    )
    return Preferences(train, evaluation, report, found, template.text)


def _read(data: DataRecipe, sources: Sequence[Source], labelled: bool) -> list[FileRows]:
    """All files; what is wrong with each is told at once."""
    format = named_format(data.format, LABELLED if labelled else PAIRS) if data.format else None
    found, problems = [], []
    for source in sources:
        for path in data_files(source.path):
            rows = islice(read_rows(path), data.limit)
            try:
                file = read_preferences(str(path), rows, labelled=labelled, format=format, columns=source.columns)
            except DataError as error:
                problems.append(str(error))
                continue
            if data.system:
                file.examples = [row._replace(prompt=_with_system(row.prompt, data.system)) for row in file.examples]
            found.append(file)
    raise_all(DataError, problems)
    return found


def _with_system(prompt: list[Message], system: str) -> list[Message]:
    return prompt if prompt[0]["role"] == "system" else [{"role": "system", "content": system}, *prompt]


def _split(files: Sequence[FileRows], size: float | int, seed: int) -> tuple[list[FileRows], list[FileRows]]:
    keys = [[_opening(row) for row in file.examples] for file in files]
    openings = list(dict.fromkeys(chain.from_iterable(keys)))
    kept, held = held_out(len(openings), size, seed=seed)
    if not len(kept):
        raise DataError(f"data.eval_size: {size} leaves none of {len(openings):,} prompts to train on")
    apart = {openings[index] for index in held}
    parts = [
        [[row for row, key in zip(file.examples, its_keys) if (key in apart) is out] for out in (False, True)]
        for file, its_keys in zip(files, keys)
    ]
    train = [replace(file, examples=stay) for file, (stay, _) in zip(files, parts)]
    return train, [
        replace(file, examples=go, unusable=Tally(), ignored=Counter()) for file, (_, go) in zip(files, parts) if go
    ]


def _opening(row: Pair | Labelled) -> str:
    """The chat up to its first user message: what rows of one prompt, or of one tree, have in common."""
    first = next(at for at, message in enumerate(row.prompt) if message["role"] == "user")
    return chat_key(row.prompt[: first + 1])


def _tokenise(
    files: Sequence[FileRows],
    data: DataRecipe,
    labelled: bool,
    tokenizer: Any,
    template: ChatTemplate,
    stop_ids: set[int],
    progress: Progress | None,
) -> tuple[PairRows | LabelledRows, SetReport]:
    tokeniser = Tokeniser(
        tokenizer, template, stop_ids=stop_ids, learn_all=False, max_length=data.max_length, on_long=data.on_long
    )
    pieces = label_pieces if labelled else pair_pieces
    with no_garbage_collection():
        rows, reports = make_rows(files, lambda file: pieces(tokeniser, file.examples), progress)
    examples = [_example(row) for file in files for row in file.examples]
    report = SetReport(reports, replace(tokeniser.cuts), check.same_prompts(tokeniser, examples))
    check.require_supervised(rows, report)
    check.require_stop(rows, stop_ids, tokenizer)
    check.require_one_bos(rows, tokeniser.encoder.bos)
    values = [{row.line: _value(row) for row in file.examples} for file in files]
    found = np.array([values[file][line] for file, line in zip(rows.file.tolist(), rows.line.tolist())])
    return LabelledRows(rows, found, mismatch(rows)) if labelled else PairRows(rows, found[::2]), report


def _example(row: Pair | Labelled) -> Example:
    return pair_examples(row)[0] if isinstance(row, Pair) else labelled_example(row)


def _value(row: Pair | Labelled) -> float | bool:
    return row.margin or 0.0 if isinstance(row, Pair) else row.desirable


def _size(rows: PairRows | LabelledRows) -> Size:
    return replace(Size.of(rows.rows), rows=len(rows))
