"""Conversations of every shape, to see whether two places write and tokenise a chat alike."""

from __future__ import annotations

from typing import Any

from smidgen.data.tokenise import encode_prompt
from smidgen.errors import DataError

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}


def _chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


# A name, the messages, the tools.
CONVERSATIONS: tuple[tuple[str, list[dict[str, Any]], list[Any] | None], ...] = (
    ("one question", _chat(("user", "What is 2 + 2?")), None),
    ("system", _chat(("system", "Answer in one word."), ("user", "The capital of Peru?")), None),
    ("empty system", _chat(("system", ""), ("user", "Hello there")), None),
    ("several turns", _chat(("user", "Hi"), ("assistant", " Hello!\n"), ("user", "  How are\tyou? äöü 你好 ")), None),
    ("tools", _chat(("user", "Is it raining in Oslo?")), [_WEATHER]),
)


def conversation_ids(tokenizer: Any) -> list[list[int] | None]:
    """The token ids of each conversation up to the model's answer; None where the chat template refuses it."""
    return [_ids(messages, tools, tokenizer) for _, messages, tools in CONVERSATIONS]


def _ids(messages: list[dict[str, Any]], tools: list[Any] | None, tokenizer: Any) -> list[int] | None:
    try:
        return encode_prompt(messages, tokenizer, tools=tools)
    except DataError:
        return None
