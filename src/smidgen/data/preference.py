"""Preferences: pairs of a chosen and a rejected answer, and answers labelled good or bad, in every common shape.

As in `data.formats`, the fields of a file's first row tell its format. A row of a wrong type is a mistake of the file;
a row that says nothing (a tie, an empty answer, two equal answers) is left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, combinations
from typing import Any, NamedTuple

from smidgen.data.formats import FORMATS, Example, FileRows, Format, convert_rows
from smidgen.data.messages import (
    BadRow,
    Message,
    Unusable,
    add_system,
    check_order,
    common_start,
    kind_of,
    read_message,
    read_tools,
)
from smidgen.foreign import shown

_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # Anthropic's transcripts
_MOST_RANKED = 64  # replies to one message; they give up to 2,016 pairs


class Pair(NamedTuple):
    """A prompt with two answers, the better one first.

    line: its place in the file.
    prompt: the chat up to the answers.
    chosen, rejected: the turns of each answer; the first and the last are the assistant's.
    margin: how much better the chosen answer is, where the file says so.
    chosen_first: whether the chosen answer was shown first, where the file keeps the order of showing.
    """

    line: int
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None
    margin: float | None = None
    chosen_first: bool | None = None


class Labelled(NamedTuple):
    """A prompt with one answer (its turns, as in `Pair`), and whether it is one to learn or to avoid."""

    line: int
    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    tools: list[Any] | None = None


def read_preferences(
    path: str,
    rows: Iterator[tuple[int, Any]],
    *,
    labelled: bool = False,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
) -> FileRows:
    """Convert the rows of one file to `Pair`s, or, with `labelled`, to `Labelled` rows; otherwise as `convert_rows`.

    A tree of ranked replies gives a pair for each two replies to the same message.

    Raises:
        DataError: a line for each kind of mistake, naming the first row and counting the others.
    """
    formats = LABELLED if labelled else PAIRS
    found = convert_rows(path, rows, format=format, columns=columns, formats=formats)
    found.examples = list(chain.from_iterable(found.examples))
    return found


def unpaired(pairs: Iterable[Pair]) -> list[Labelled]:
    """Make two labelled rows of each pair, the chosen answer first."""
    return [
        Labelled(pair.line, pair.prompt, answer, desirable, pair.tools)
        for pair in pairs
        for answer, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def paired(rows: Iterable[Labelled]) -> tuple[list[Pair], list[Labelled]]:
    """Pair the good and the bad answers to the same prompt, the first with the first and so on.

    Equal answers do not make a pair.

    Returns:
        The pairs, in the order and with the lines of their good answers, and the rows that found no other.
    """
    waiting: dict[str, list[Labelled]] = {}
    pairs = []
    for row in rows:
        others = waiting.setdefault(chat_key(row.prompt, row.tools), [])
        match = next((o for o in others if o.desirable != row.desirable and o.answer != row.answer), None)
        if match is None:
            others.append(row)
            continue
        others.remove(match)
        good, bad = (row, match) if row.desirable else (match, row)
        pairs.append(Pair(good.line, good.prompt, good.answer, bad.answer, good.tools))
    left = [row for others in waiting.values() for row in others]
    return sorted(pairs, key=lambda pair: pair.line), sorted(left, key=lambda row: row.line)


def chat_key(messages: list[Message], tools: list[Any] | None = None) -> str:
    """A text that is the same for equal chats with equal tools only."""
    return json.dumps([messages, tools], sort_keys=True)


def answer_example(line: int, prompt: list[Message], answer: list[Message], tools: list[Any] | None) -> Example:
    """A prompt and one answer as an example of which the answer alone is learned."""
    context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]
    return Example(line, [*context, *answer], None, tools)


# Reading prompts and answers.


def _turns(row: Mapping[str, Any], name: str) -> list[Message]:
    """A field as messages: a text is the assistant's, unless it is a transcript."""
    value = row.get(name)
    if isinstance(value, str):
        return _transcript(value) if _is_transcript(value) else [{"role": "assistant", "content": value}]
    if name not in row:
        raise BadRow(f"field '{name}' is missing")
    if isinstance(value, dict):
        return [read_message(name, value)]
    if not isinstance(value, list):
        raise BadRow(f"field '{name}' must be text or messages, got {kind_of(value)}")
    return [read_message(f"{name}[{index}]", turn) for index, turn in enumerate(value)]


def _is_transcript(text: str) -> bool:
    start = _SPEAKER.match(text)
    return start is not None and start[1] == "Human"


def _transcript(text: str) -> list[Message]:
    _, *parts = _SPEAKER.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _prompt(line: int, row: Mapping[str, Any], base: Format) -> list[Message]:
    """The chat up to the answer: messages, a transcript, or what the format `base` makes of its texts."""
    name = base.needs[0]
    value = row.get(name)
    if isinstance(value, str) and not _is_transcript(value):
        return base.convert(line, {**row, base.needs[-1]: "-"}).messages[:-1]
    messages = _turns(row, name)
    if isinstance(value, str) and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # a transcript's last words, 'Assistant:', call for the answer
    add_system(messages, row)
    return messages


def _pair(
    line: int,
    row: Mapping[str, Any],
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    chosen_first: bool | None = None,
) -> Pair:
    """Check a pair, and take the prompt out of the answers where they are whole chats."""
    if not chosen or not rejected:
        raise Unusable("empty rejected" if chosen else "empty chosen")
    if chosen == rejected:
        raise Unusable("chosen and rejected are the same")
    if all(answer[0]["role"] != "assistant" for answer in (chosen, rejected)):
        shared = common_start(chosen, rejected)
        whole = chosen[:shared]
        if any(message not in whole for message in prompt if message["role"] != "system"):
            raise BadRow("'chosen' and 'rejected' are whole chats, but the prompt is not the beginning of both")
        prompt, chosen, rejected = whole, chosen[shared:], rejected[shared:]
        add_system(prompt, row)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(name, prompt, answer)
    return Pair(line, prompt, chosen, rejected, read_tools(row), _margin(row), chosen_first)


def _check_answer(name: str, prompt: list[Message], answer: list[Message]) -> None:
    if not answer or not (answer[-1]["content"].strip() or "tool_calls" in answer[-1]):
        raise Unusable(f"empty {name}")
    if any(turn["role"] != "assistant" for turn in (answer[0], answer[-1])):
        raise Unusable(f"{name} does not begin and end with a turn of the assistant")
    check_order([*prompt, *answer])


def _margin(row: Mapping[str, Any]) -> float | None:
    margin = row.get("margin")
    if margin is None or type(margin) in (int, float):
        return margin
    try:
        return float(margin)
    except (TypeError, ValueError):
        raise BadRow(f"field 'margin' must be a number, got {kind_of(margin)}") from None


# The formats of pairs.

_EXTRA = ("system", "tools", "margin")


def _with_prompt(base: Format) -> Format:
    def convert(line: int, row: Mapping[str, Any]) -> list[Pair]:
        return [_pair(line, row, _prompt(line, row, base), _turns(row, "chosen"), _turns(row, "rejected"))]

    needs = (base.needs[0], "chosen", "rejected")
    return Format("/".join(needs), needs, (*base.takes, *_EXTRA), base.style, convert)


def _whole_chats(line: int, row: Mapping[str, Any]) -> list[Pair]:
    """Answers that begin with their prompt; of two plain texts it is what they have in common, in whole words."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (isinstance(chosen, str) and isinstance(rejected, str)) or _is_transcript(chosen):
        return [_pair(line, row, [], _turns(row, "chosen"), _turns(row, "rejected"))]
    shared = common_start(chosen, rejected)
    start = max((at for at in range(shared) if chosen[at].isspace()), default=-1) + 1
    if not chosen[:start].strip():
        raise Unusable("chosen and rejected do not begin with a prompt in common")
    texts = {"prompt": chosen[:start].strip(), "chosen": chosen[start:], "rejected": rejected[start:]}
    return PAIRS["prompt/chosen/rejected"].convert(line, {**row, **texts})


def _shown(base: Format | None, first: str, second: str, verdict: str, verdicts: Mapping[str, int]) -> Format:
    """Two answers in the order in which they were shown, and the verdict; without `base` they are whole chats."""

    def convert(line: int, row: Mapping[str, Any]) -> list[Pair]:
        said = str(row.get(verdict)).lower()
        if said.startswith(("tie", "both")):
            raise Unusable("a tie")
        if said not in verdicts:
            known = ", ".join(verdicts)
            raise BadRow(f"field '{verdict}' must be one of {known} or tie, got {shown(repr(row.get(verdict)))}")
        answers = [_turns(row, first), _turns(row, second)]
        better = verdicts[said]
        prompt = _prompt(line, row, base) if base else []
        return [_pair(line, row, prompt, answers[better], answers[1 - better], better == 0)]

    needs = (*(base.needs[:1] if base else ()), first, second, verdict)
    return Format("/".join(needs), needs, _EXTRA, base.style if base else "alpaca", convert)


def _tree(line: int, row: Mapping[str, Any]) -> list[Pair]:
    """Open Assistant's tree of messages; of replies to a person's message those with the lower rank are better."""
    pairs: list[Pair] = []
    waiting: list[tuple[list[Message], Any]] = [([], row.get("prompt"))]
    while waiting:
        above, node = waiting.pop()
        chat = [*above, _tree_message(node)]
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise BadRow(f"'replies' must be a list, got {kind_of(replies)}")
        answers = [_tree_message(reply) for reply in replies]
        if chat[-1]["role"] == "user":
            ranks = [(reply["rank"], at) for at, reply in enumerate(replies) if type(reply.get("rank")) is int]
            ranked = [(rank, answers[at]) for rank, at in sorted(ranks)]
            if len(ranked) > _MOST_RANKED:
                raise BadRow(f"{len(ranked):,} ranked replies to one message; at most {_MOST_RANKED} are read")
            pairs += [
                _pair(line, {}, [*chat], [good], [bad])
                for (rank, good), (other, bad) in combinations(ranked, 2)
                if rank < other and good != bad
            ]
        waiting += [(chat, reply) for reply in reversed(replies)]
    if not pairs:
        raise Unusable("no two replies to a message are ranked")
    return pairs


def _tree_message(node: Any) -> Message:
    if not isinstance(node, dict) or type(node.get("text")) is not str:
        raise BadRow("a message of the tree must be an object with a 'text'")
    roles = {"prompter": "user", "assistant": "assistant"}
    if node.get("role") not in roles:
        raise BadRow(f"'role' must be prompter or assistant, got {shown(repr(node.get('role')))}")
    return {"role": roles[node["role"]], "content": node["text"]}


_TEXTS = tuple(FORMATS[name] for name in "alpaca prompt/completion question/answer query/response input/output".split())
_CHATS = (FORMATS["messages"], FORMATS["sharegpt"])
_BY_LETTER = {"a": 0, "b": 1, "model_a": 0, "model_b": 1}


def _table(formats: Iterable[Format]) -> dict[str, Format]:
    return {format.name: format for format in formats}


PAIRS = _table(
    (
        *(_with_prompt(base) for base in (*_TEXTS, *_CHATS)),
        Format("chosen/rejected", ("chosen", "rejected"), _EXTRA, "alpaca", _whole_chats),
        _shown(FORMATS["prompt/response"], "response_0", "response_1", "better_response_id", {"0": 0, "1": 1}),
        _shown(FORMATS["prompt/response"], "response_a", "response_b", "winner", _BY_LETTER),
        _shown(None, "conversation_a", "conversation_b", "winner", _BY_LETTER),
        Format("tree", ("message_tree_id", "prompt"), (), "alpaca", _tree),
    )
)


# The formats of labelled rows.


def _labelled(base: Format, label: str) -> Format:
    def convert(line: int, row: Mapping[str, Any]) -> list[Labelled]:
        desirable = _LABELS.get(str(row.get(label)).lower())
        if desirable is None:
            raise BadRow(f"field '{label}' must be true or false, got {shown(repr(row.get(label)))}")
        if base in _CHATS:
            chat = base.convert(line, row).messages
            last = max(at for at, message in enumerate(chat) if message["role"] == "user")
            prompt, answer = chat[: last + 1], chat[last + 1 :]
        else:
            prompt, answer = _prompt(line, row, base), _turns(row, base.needs[-1])
        _check_answer("answer", prompt, answer)
        return [Labelled(line, prompt, answer, desirable, read_tools(row))]

    needs = (*base.needs, label)
    return Format("/".join(needs), needs, (*base.takes, "system", "tools"), base.style, convert)


_LABELS = {"true": True, "1": True, "false": False, "0": False}
LABELLED = _table(_labelled(base, label) for label in ("label", "kto_tag") for base in (*_TEXTS, *_CHATS))
