"""What a chat template may spend on one chat, and what each operation costs.

Three things are bounded for each chat: the processor time of the thread, the text and the items that the template
makes, and the size of any number. What can make much out of little pays before it is done, so that no single operation
takes long or fills the memory.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Collection, ItemsView, Iterable, KeysView, Mapping, ValuesView
from typing import Any

from jinja2.exceptions import SecurityError

SECONDS = 1.0  # of processor time, for one chat
CHARACTERS = 2**24  # made for one chat: its text and all that is made on the way
_ITEM = 64  # what an item of a list counts for, in characters
_LARGEST = 10_000  # number given to a filter or a method, such as a width
_LARGEST_BITS = 4096  # of a whole number
SHORT = 100  # characters of a format
_SPACES = "".join(filter(str.isspace, map(chr, range(0x3001))))
_STEPS = 32  # between two looks at the clock
_CONSUMERS = ("dictsort", "groupby", "join", "list", "max", "min", "sort", "sum", "unique")  # read an iterable whole
_ANY_NUMBER = ("d", "default", "float", "int", "max", "min")
_ITERABLE = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TemplateLimit(SecurityError):
    """A template asked for more than a chat can need."""


class _Meter(threading.local):
    """What is left to the chat that this thread renders."""

    characters = CHARACTERS
    until = 0.0
    steps = 0

    def start(self) -> None:
        self.characters, self.until = CHARACTERS, time.thread_time() + SECONDS


METER = _Meter()


def step() -> None:
    METER.steps += 1
    if not METER.steps % _STEPS and time.thread_time() > METER.until:
        raise TemplateLimit(f"it takes more than {SECONDS:g} s for one chat")


def spend(characters: int) -> None:
    METER.characters -= characters
    if METER.characters < 0:
        raise TemplateLimit(f"it makes more than {CHARACTERS:,} characters for one chat")


def paid(value: Any) -> Any:
    """Answer `value` after paying for all that is in it, as often as it is in it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str | bytes):
            spend(len(part))
        elif isinstance(part, dict):
            spend(2 * _ITEM * len(part))
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, _ITERABLE):
            spend(_ITEM * len(part))
            waiting += part
        elif isinstance(part, int) and part.bit_length() > _LARGEST_BITS:
            raise TemplateLimit("it makes a number of more than a thousand digits")
    return value


def listed(values: Any) -> Any:
    """The items of an iterable as a collection, each paid for before it is kept."""
    if isinstance(values, Collection):
        spend(_ITEM * len(values))
        return values
    kept = []
    for value in values:
        spend(_ITEM)
        kept.append(value)
    return kept


def joined(values: Iterable[Any]) -> str:
    texts = [value if type(value) is str else str(paid(value)) for value in values]
    spend(sum(map(len, texts)))
    return "".join(texts)


# ---- operators ----


def _add(left: Any, right: Any) -> Any:
    paid(left)
    paid(right)
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return paid(left * right)
    for values, times in ((left, right), (right, left)):
        if isinstance(values, str | list | tuple) and isinstance(times, int):
            before = METER.characters
            paid(values)
            spend((before - METER.characters) * max(0, times))
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _LARGEST_BITS:
        raise TemplateLimit("it makes a number of more than a thousand digits")
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        check_format(left, "%", right)
    return left % right


def check_format(text: str, mark: str, values: Any) -> None:
    """Pay for a format that shows all `values` at each of its marks; refuse widths."""
    if re.search(r"\d{4}|\*|\{[^{}]*\{", text):
        raise TemplateLimit("it formats with a large or computed width")
    before = METER.characters
    paid(values)
    spend((before - METER.characters + 1000) * text.count(mark) + len(text))


OPERATORS: dict[str, Callable[[Any, Any], Any]] = {"+": _add, "*": _multiply, "**": _power, "%": _modulo}


# ---- filters ----


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (indent is not None and not (isinstance(indent, int) and indent <= 16)) or len(str(separators)) > SHORT:
        raise TemplateLimit("tojson: the indent is larger than 16, or the separators are long")
    paid(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _before_filter(name: str, value: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Pay for what a filter will make; answer the value to give it."""
    if name not in _ANY_NUMBER and any(
        isinstance(number, int) and abs(number) > _LARGEST for number in (*arguments, *named.values())
    ):
        raise TemplateLimit(f"it gives a number above {_LARGEST:,} to '{name}'")
    if name in _CONSUMERS:
        value = listed(value)
    if name == "join":
        spend(len(value) * max((len(str(text)) for text in (*arguments, *named.values())), default=0))
        for item in value:
            paid(item)
    elif name == "sum" and not isinstance(named.get("start", next(iter(arguments[1:]), 0)), int | float):
        raise TemplateLimit("sum: adds up numbers only")
    elif name == "replace" and len(arguments) >= 2:
        _pay_replacement(str(value), *map(str, arguments[:2]))
    elif name == "indent":
        width = next(iter((*arguments, *named.values())), 4)
        spend((str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "format":
        check_format(str(value), "%", (*arguments, named))
    return value


def _pay_replacement(text: str, old: str, new: str, *_: Any) -> None:
    spend(text.count(old) * len(new))


def metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `function`, its work paid for; Jinja's marks on it are kept."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # context or environment stand before the value

    @functools.wraps(function)
    def paying(*arguments: Any, **named: Any) -> Any:
        step()
        value, rest = arguments[leading], arguments[leading + 1 :]
        value = _before_filter(name, value, rest, named)
        answer = function(*arguments[:leading], value, *rest, **named)
        return paid(answer) if isinstance(answer, str | list | dict) else answer

    return paying


def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        step()
        return function(*arguments, **named)

    return counted


# ---- methods ----


def before_method(method: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a method of a built-in type will make; answer the arguments to give it."""
    text, name = method.__self__, method.__name__
    if any(isinstance(number, int) and abs(number) > _LARGEST for number in arguments) and not isinstance(text, dict):
        raise TemplateLimit(f"it gives a number above {_LARGEST:,} to '{name}'")
    if isinstance(text, str):
        if name == "replace" and len(arguments) >= 2:
            _pay_replacement(text, *arguments)
        elif name == "join" and arguments:
            items = listed(arguments[0])
            spend(len(items) * len(text))
            for item in items:
                paid(item)
            return (items,)
        elif name in ("split", "rsplit") and arguments and isinstance(arguments[0], str) and arguments[0]:
            spend(_ITEM * text.count(arguments[0]))
        elif name in ("split", "rsplit", "splitlines"):
            spend(_ITEM * sum(map(text.count, _SPACES)))
    return arguments
