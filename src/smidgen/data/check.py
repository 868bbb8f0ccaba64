"""What is said about the data before anything is trained, and what stops a run at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from smidgen.data.formats import Example
from smidgen.data.rows import COMPLETE, PROMPT_CUT, TokenRow, TokenRows
from smidgen.data.tokenise import Cuts, Piece, Tokeniser
from smidgen.errors import DataError

OPEN, CLOSE = "\u27e6", "\u27e7"  # around what is learned
_SAMPLED = 64
_SHOWN = 3
_BARS = 8
_SEGMENT = 600  # characters of a shown segment; of a longer one the beginning and the end are shown


@dataclass(frozen=True)
class FileReport:
    """What was found in one file. `left`: reason -> number of rows and the first places."""

    path: str
    format: str
    rows: int
    ignored: dict[str, int]
    left: dict[str, tuple[int, list[str]]]


@dataclass(frozen=True)
class SetReport:
    """What became of the rows of a training or evaluation set.

    prompts: of how many sampled rows the prompt that chat builds is the one trained with, and how many were sampled.
    """

    files: list[FileReport]
    cuts: Cuts
    prompts: tuple[int, int]
    cached: bool = False

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


@dataclass
class DataReport:
    """The whole account of a run's data; `lines` tells it."""

    template: str
    max_length: int
    train: SetReport
    eval: SetReport | None
    train_size: Size
    eval_size: Size | None
    duplicates: int
    overlap: int
    histogram: list[tuple[int, int, int]]  # from, to, rows
    samples: list[str]
    mixture: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Answer the report as lines to print; rendered samples come last."""
        lines = [f"data: train {self.train_size}" + (f"; eval {self.eval_size}" if self.eval_size else "")]
        lines += _set_lines("train", self.train, self.max_length)
        if self.eval:
            lines += _set_lines("eval", self.eval, self.max_length)
        lines += self.mixture
        same, sampled = self.train.prompts
        checked = f"; chat builds the trained prompt in {same} of {sampled} sampled rows" if sampled else ""
        lines.append(f"template: {self.template}{checked}")
        if self.duplicates:
            lines.append(f"duplicates: {self.duplicates:,} training rows repeat an earlier one")
        if self.overlap:
            lines.append(f"overlap: {self.overlap:,} evaluation rows also stand in the training data")
        most = max((rows for _, _, rows in self.histogram), default=1)
        lines.append("tokens per row:")
        lines += [
            f"  {low:>6,} - {high:>6,}  {rows:>9,}  {'#' * round(40 * rows / most)}"
            for low, high, rows in self.histogram
        ]
        lines.append(f"{len(self.samples)} rows as they are trained; what is learned stands in {OPEN}{CLOSE}:")
        return lines + self.samples


@dataclass(frozen=True)
class Size:
    """Rows, tokens, and tokens with loss; or other things with loss, where `what` names them."""

    rows: int
    tokens: int
    supervised: int
    what: str = ""

    def __str__(self) -> str:
        share = self.supervised / max(1, self.tokens)
        learned = f"{self.supervised:,} {self.what}" if self.what else f"{share:.0%} supervised"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {learned}"

    @classmethod
    def of(cls, rows: Any, what: str = "") -> Size:
        return cls(len(rows), int(rows.lengths.sum()), int(rows.supervised_counts.sum()), what)


def _set_lines(name: str, report: SetReport, max_length: int) -> list[str]:
    lines = []
    for file in report.files:
        ignored = ", ".join(f"{field} ({rows:,} rows)" for field, rows in file.ignored.items())
        told = f"; ignored fields: {ignored}" if ignored else ""
        cached = "; tokens from the cache" if report.cached else ""
        lines.append(f"  {name} {file.path}: {file.format}, {file.rows:,} rows{told}{cached}")
        for reason, (count, places) in file.left.items():
            shown = ", ".join(places) + (", ..." if count > len(places) else "")
            lines.append(f"    {count:,} rows left out: {reason} (lines {shown})")
    if report.cuts.not_found:
        lines.append(
            f"  {report.cuts.not_found:,} answers are not learned: the template rewrites them beyond recognition"
        )
    return lines + ([f"  {text}"] if (text := cuts_line(report.cuts, report.rows, max_length)) else [])


def cuts_line(cuts: Cuts, rows: int, max_length: int) -> str:
    """Say what became of long rows in one line; an empty text where there are none."""
    if not cuts.long:
        return ""
    told = (
        (cuts.dropped, "dropped"),
        (cuts.turns_cut, "lose their oldest turns"),
        (cuts.prompt_cut, "lose the beginning of their prompt"),
        (cuts.ending_lost, "lose their ending (EOS)"),
        (cuts.end_cut, "lose their last words"),
        (cuts.nothing_left, "lose all supervised tokens -> dropped"),
        (cuts.split, f"long texts are split into {cuts.pieces:,} rows"),
    )
    parts = ", ".join(f"{count:,} {words}" for count, words in told if count)
    lost = f"; {cuts.tokens_lost:,} tokens are not trained on" if cuts.tokens_lost else ""
    return f"{cuts.long:,}/{rows:,} rows exceed {max_length:,} tokens: {parts}{lost}"


def require_supervised(rows: TokenRows, report: SetReport) -> None:
    """Raise `DataError`, with the reasons, when no token of the rows carries loss."""
    if len(rows) and rows.supervised_counts.any():
        return
    reasons: dict[str, int] = {}
    for file in report.files:
        for reason, (count, _) in file.left.items():
            reasons[reason] = reasons.get(reason, 0) + count
    told = ", ".join(f"{reason} in {count:,}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    raise DataError(f"data: 0 supervised tokens in {report.rows:,} rows (reason: {told or 'no answer in any row'})")


def require_stop(rows: TokenRows, stop_ids: set[int], tokenizer: Any) -> None:
    """Raise `DataError` when a sampled row that keeps its ending does not teach a stop token."""
    whole = np.flatnonzero(np.isin(rows.state[rows.order], (COMPLETE, PROMPT_CUT)))
    sampled = whole[np.unique(np.linspace(0, len(whole) - 1, _SAMPLED).astype(int))] if len(whole) else whole
    good = sum(_last_learned(rows[index]) in stop_ids for index in sampled.tolist())
    if good == len(sampled):
        return
    names = ", ".join(tokenizer.convert_ids_to_tokens(sorted(stop_ids))) or "none"
    raise DataError(
        f"data: {good} of {len(sampled)} sampled rows end in a stop token (eos={tokenizer.eos_token}; stop tokens: "
        f"{names}); the model will not learn to stop. Fix: let the chat template end an assistant turn with "
        "one of them (data.template: path of a .jinja file), or add the end token that the template writes to "
        "eos_token_id in generation_config.json"
    )


def _last_learned(row: TokenRow) -> int:
    return int(row.input_ids[np.flatnonzero(row.supervised)[-1]])


def require_one_bos(rows: TokenRows, bos: int | None) -> None:
    """Raise `DataError` when a row begins without the BOS that the tokenizer wants, or with two."""
    if bos is None:
        return
    for index in np.unique(np.linspace(0, len(rows) - 1, _SAMPLED).astype(int)).tolist():
        head = rows[index].input_ids[:2].tolist()
        if head == [bos, bos]:
            raise DataError(
                f"{rows[index].where}: the row begins with two BOS tokens; the chat template writes one too many"
            )


def same_prompts(tokeniser: Tokeniser, examples: Sequence[Example]) -> tuple[int, int]:
    """Compare the prompts that chat builds with those of the training rows: how many of a sample are equal."""
    chats = [example for example in examples if example.messages and example.messages[-1]["role"] == "assistant"]
    if not chats or tokeniser.template is None or tokeniser.learn_all:
        return 0, 0
    same = sampled = 0
    for index in np.unique(np.linspace(0, len(chats) - 1, _SAMPLED // 4).astype(int)).tolist():
        piece = tokeniser.single(chats[index])
        if not isinstance(piece, Piece) or piece.state != COMPLETE:
            continue
        prompt = tokeniser.prompt(chats[index].messages[:-1], chats[index].tools, chats[index].images)
        sampled += 1
        same += prompt == piece.ids[: piece.learned[-1][0]]
    return same, sampled


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Count rows in stretches of equal width: (shortest, longest, rows) of each."""
    width = -(-int(lengths.max()) // _BARS)
    counts = np.bincount((lengths - 1) // width)
    return [(index * width + 1, (index + 1) * width, int(count)) for index, count in enumerate(counts)]


def samples(rows: TokenRows, tokenizer: Any) -> list[str]:
    """Decode some rows, the learned stretches in marks."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, _SHOWN).astype(int))
    return [f"--- {rows[index].where}\n{marked(rows[index], tokenizer)}" for index in chosen]


def marked(row: TokenRow, tokenizer: Any) -> str:
    """Decode a row with its special tokens; each learned stretch stands in marks."""
    edges = [0, *(np.flatnonzero(np.diff(row.supervised)) + 1).tolist(), len(row.input_ids)]
    text, shown = "", 0
    for first, end in pairwise(edges):
        # Decoded from the start each time: a tokenizer may drop the space before the first word.
        whole = tokenizer.decode(row.input_ids[:end].tolist(), clean_up_tokenization_spaces=False)
        part, shown = _shorten(whole[shown:]), len(whole)
        text += f"{OPEN}{part}{CLOSE}" if row.supervised[first] else part
    return text


def _shorten(text: str) -> str:
    return text if len(text) <= _SEGMENT else f"{text[: _SEGMENT // 2]} [...] {text[-_SEGMENT // 2 :]}"
