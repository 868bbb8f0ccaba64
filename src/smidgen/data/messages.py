"""Messages: the fields of a row read with care, the turns of a chat in one shape, tool calls and the order of roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smidgen.foreign import parse_json, shown

Message = dict[str, Any]
MARK = "<image>"  # where an image stands in a text


class BadRow(Exception):
    """The row is not what its format says."""


class Unusable(Exception):
    """There is nothing to learn from the row."""


_KINDS = {
    str: "text",
    dict: "object",
    list: "list",
    bool: "true/false",
    int: "number",
    float: "number",
    type(None): "null",
}


def kind_of(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)


def common_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters or messages the two begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def text_of(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if type(value) is str:
        return value
    if name not in row:
        raise BadRow(f"field '{name}' is missing")
    raise BadRow(f"field '{name}' must be text, got {kind_of(value)}")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    return text_of(row, name) if row.get(name) is not None else ""


_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


_KEPT = ("name", "tool_call_id", "reasoning_content", "weight")  # of a message, passed on as they are


def read_message(place: str, turn: Any, images: list[str | None] | None = None) -> Message:
    """Read one turn; the paths of its image parts are added to `images`, and a mark stands for each in its text."""
    if not isinstance(turn, dict):
        raise BadRow(f"{place} must be an object, got {kind_of(turn)}")
    role_field, text_field = ("role", "content") if "role" in turn else ("from", "value")
    name = turn.get(role_field)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow(f"{place}: '{role_field}' must be one of {', '.join(_ROLES)}; got {shown(repr(name))}")
    content = turn.get(text_field)
    kinds = ("text",) if images is None else ("text", "image")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") in kinds for part in content):
        if images is not None:
            images += [part.get("path") for part in content if part["type"] == "image"]
        content = "".join(text_of(part, "text") if part["type"] == "text" else MARK for part in content)
    calls = turn.get("tool_calls")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"{place}: '{text_field}' must be text, got {kind_of(content)}")
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _parse_calls(place, content)}
    message = {"role": role, "content": content, **{key: turn[key] for key in _KEPT if turn.get(key) is not None}}
    if calls:
        if not isinstance(calls, list):
            raise BadRow(f"{place}: 'tool_calls' must be a list, got {kind_of(calls)}")
        message["tool_calls"] = [_call(place, call) for call in calls]
    return message


def _parse_calls(place: str, text: str) -> list[Message]:
    value = parse_json(text, f"{place}: a function call", BadRow)
    return [_call(place, call) for call in (value if isinstance(value, list) else [value])]


def _call(place: str, call: Any) -> Message:
    """The call in OpenAI's shape; templates expect its arguments as an object, OpenAI writes them as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not (isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise BadRow(f"{place}: a function call must have a 'name'")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{place}: 'arguments' of {shown(function['name'])}", BadRow)
    known = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {**known, "id": call["id"]} if "id" in call else known


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools, "field 'tools'", BadRow)
    if not tools:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("field 'tools' must be a list of objects")
    return tools


def add_system(messages: list[Message], row: Mapping[str, Any]) -> None:
    """Put the row's field 'system' first, unless it is empty or the chat has a system message."""
    system = optional_text(row, "system")
    if system.strip() and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})


def check_order(messages: list[Message]) -> None:
    before = None
    for message in messages:
        role = message["role"]
        allowed = _FOLLOWS[role]
        if before not in allowed:
            raise Unusable(f"roles out of order ({role} after {before})" if before else f"the first turn is {role}'s")
        if role in ("user", "assistant") and not message["content"].strip() and "tool_calls" not in message:
            raise Unusable(f"empty {role} turn")
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant turn")


_FOLLOWS: dict[str, tuple[str | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
