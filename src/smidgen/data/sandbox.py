"""Chat templates are foreign programs: here they render without reach and within bounds.

The language is the one that transformers gives to chat templates (Jinja's immutable sandbox, `tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, loop controls), with three bounds for each chat: the processor
time of the thread, the text and the items that the template makes, and the size of any number. Every operation that
can make much out of little is paid for before it runs, so no single one of them can take long or fill the memory.
"""

from __future__ import annotations

import functools
import json
import operator
import re
import threading
import time
import types
from collections.abc import Callable, Collection, ItemsView, Iterable, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST_TEMPLATE = 200_000  # characters
SECONDS = 1.0  # of processor time, for one chat
CHARACTERS = 2**24  # made for one chat: its text and all that is made on the way
_ITEM = 16  # what an item of a list counts for, in characters
_LARGEST = 10_000  # number given to a filter or a method, such as a width
_LARGEST_BITS = 4096  # of a whole number
_SHORT = 100  # characters of a format
_STEPS = 32  # between two looks at the clock

_FILTERS = (
    "abs batch capitalize center count d default dictsort e escape first float format groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort "
    "string sum title tojson trim truncate unique upper wordcount"
).split()
_CONSUMERS = ("dictsort", "groupby", "join", "list", "max", "min", "sort", "sum", "unique")  # read an iterable whole
_ANY_NUMBER = ("d", "default", "float", "int", "max", "min")
# Methods of text that make much out of little, and that no chat template needs.
_DENIED = frozenset("center ljust rjust zfill expandtabs translate encode format_map to_bytes".split())
_VIEWS = (KeysView, ValuesView, ItemsView)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the usual one first


class TemplateLimit(SecurityError):
    """A template asked for more than a chat can need."""


class _Meter(threading.local):
    """What is left to the chat that this thread renders."""

    characters = CHARACTERS
    until = 0.0
    steps = 0

    def start(self) -> None:
        self.characters, self.until = CHARACTERS, time.thread_time() + SECONDS


_meter = _Meter()


def _step() -> None:
    _meter.steps += 1
    if not _meter.steps % _STEPS and time.thread_time() > _meter.until:
        raise TemplateLimit(f"it takes more than {SECONDS:g} s for one chat")


def _spend(characters: int) -> None:
    _meter.characters -= characters
    if _meter.characters < 0:
        raise TemplateLimit(f"it makes more than {CHARACTERS:,} characters for one chat")


def _paid(value: Any) -> Any:
    """Answer `value` after paying for all that is in it, as often as it is in it."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str | bytes):
            _spend(len(part))
        elif isinstance(part, dict):
            _spend(2 * _ITEM * len(part))
            waiting += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | set | frozenset | _VIEWS):
            _spend(_ITEM * len(part))
            waiting += part
        elif isinstance(part, int) and part.bit_length() > _LARGEST_BITS:
            raise TemplateLimit("it makes a number of more than a thousand digits")
    return value


def _listed(values: Any) -> Any:
    """The items of an iterable as a collection, each paid for before it is kept."""
    if isinstance(values, Collection):
        _spend(_ITEM * len(values))
        return values
    kept = []
    for value in values:
        _spend(_ITEM)
        kept.append(value)
    return kept


def _joined(values: Iterable[Any]) -> str:
    texts = [value if type(value) is str else str(_paid(value)) for value in values]
    _spend(sum(map(len, texts)))
    return "".join(texts)


# ---- operators ----


def _add(left: Any, right: Any) -> Any:
    _paid(left)
    _paid(right)
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        return _paid(left * right)
    for values, times in ((left, right), (right, left)):
        if isinstance(values, str | list | tuple) and isinstance(times, int):
            before = _meter.characters
            _paid(values)
            _spend((before - _meter.characters + _ITEM) * max(0, times))
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _LARGEST_BITS:
        raise TemplateLimit("it makes a number of more than a thousand digits")
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_format(left, "%", right)
    return left % right


def _check_format(text: str, mark: str, values: Any) -> None:
    """Pay for a format that shows all `values` at each of its marks; refuse widths."""
    if re.search(r"\d{4}|\*|\{[^{}]*\{", text):
        raise TemplateLimit("it formats with a large or computed width")
    before = _meter.characters
    _paid(values)
    _spend((before - _meter.characters + 1000) * text.count(mark) + len(text))


# ---- filters ----


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (indent is not None and not (isinstance(indent, int) and indent <= 16)) or len(str(separators)) > _SHORT:
        raise TemplateLimit("tojson: the indent is larger than 16, or the separators are long")
    _paid(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _before_filter(name: str, value: Any, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Pay for what a filter will make; answer the value to give it."""
    if name not in _ANY_NUMBER and any(
        isinstance(number, int) and abs(number) > _LARGEST for number in (*arguments, *named.values())
    ):
        raise TemplateLimit(f"it gives a number above {_LARGEST:,} to '{name}'")
    if name in _CONSUMERS:
        value = _listed(value)
    if name == "join":
        _spend(len(value) * max((len(str(text)) for text in (*arguments, *named.values())), default=0))
        for item in value:
            _paid(item)
    elif name == "sum" and not isinstance(named.get("start", next(iter(arguments[1:]), 0)), int | float):
        raise TemplateLimit("sum: adds up numbers only")
    elif name == "replace" and len(arguments) >= 2:
        _pay_replacement(str(value), *map(str, arguments[:2]))
    elif name == "indent":
        width = next(iter((*arguments, *named.values())), 4)
        _spend((str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "format":
        _check_format(str(value), "%", (*arguments, named))
    return value


def _pay_replacement(text: str, old: str, new: str, *_: Any) -> None:
    _spend(text.count(old) * len(new))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `function`, its work paid for; Jinja's marks on it are kept."""
    leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # context or environment stand before the value

    @functools.wraps(function)
    def metered(*arguments: Any, **named: Any) -> Any:
        _step()
        value, rest = arguments[leading], arguments[leading + 1 :]
        value = _before_filter(name, value, rest, named)
        answer = function(*arguments[:leading], value, *rest, **named)
        return _paid(answer) if isinstance(answer, str | list | dict) else answer

    return metered


def _stepping(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def stepping(*arguments: Any, **named: Any) -> Any:
        _step()
        return function(*arguments, **named)

    return stepping


# ---- globals ----


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:500])


def _strftime_now(format: str) -> str:
    if len(format) > _SHORT or re.search(r"\d{3}", format):
        raise TemplateLimit("strftime_now: the format is long, or has a width")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without what else a type can do."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(_listed(keys), value)


class _Namespace(Namespace):
    """A namespace that takes no names with a leading underscore, and whose text does not show what is in it."""

    def __init__(*arguments: Any, **named: Any) -> None:  # noqa: N805  (a name may be called "self")
        self, *rest = arguments
        for name in (attributes := dict(*rest, **named)):
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name with a leading underscore, such as {name!r}")


# ---- the environment ----


class _Code(CodeGenerator):
    """Writes a step at the head of every block, and a payment around all that makes new values."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Any) -> None:
        self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._paid(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._paid(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._paid(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _paid(self, visit: Callable[[Any, Any], None], node: nodes.Node, frame: Any) -> None:
        self.write("environment.paid(")
        visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """`{% generation %}`: marks an answer for tools that want masks; the text is as without it."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own name and type)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@pass_environment
def _shown(_: Any, value: Any) -> Any:
    return value if type(value) is str else _paid(value)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    step = staticmethod(_step)
    paid = staticmethod(_paid)
    joined = staticmethod(_joined)
    concat = staticmethod(_joined)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_shown, cache_size=0
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _metered(name, self.filters[name]) for name in _FILTERS}
        self.filters["_tested"] = _stepping(operator.truth)
        self.tests = {name: _stepping(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _modulo}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        if other := template.find((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise SecurityError(f"line {other.lineno}: a chat template reads no other files")
        for loop in template.find_all(nodes.For):
            if loop.test:  # it runs for each item, outside of any block
                loop.test = nodes.Filter(loop.test, "_tested", [], [], None, None).set_lineno(loop.lineno)
        template.set_environment(self)
        return template

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _DENIED and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        text = getattr(value, "__self__", None)
        wrapped = super().wrap_str_format(value) if isinstance(text, str) else None
        if wrapped is None or not isinstance(text, str):
            return None

        def formatted(*arguments: Any, **named: Any) -> str:
            _check_format(text, "{", (arguments, named))
            return wrapped(*arguments, **named)

        return None if value.__name__ in _DENIED else formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _step()
        if isinstance(__obj, Macro):
            return super().call(__context, __obj, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        if isinstance(__obj, types.BuiltinMethodType):
            args = _before_method(__obj, args)
        answer = super().call(__context, __obj, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        return _paid(answer) if isinstance(answer, str | list | tuple | dict) else answer


def _before_method(method: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pay for what a method of a built-in type will make; answer the arguments to give it."""
    text, name = method.__self__, method.__name__
    if any(isinstance(number, int) and abs(number) > _LARGEST for number in arguments) and not isinstance(text, dict):
        raise TemplateLimit(f"it gives a number above {_LARGEST:,} to '{name}'")
    if isinstance(text, str):
        if name == "replace" and len(arguments) >= 2:
            _pay_replacement(text, *arguments)
        elif name == "join" and arguments:
            items = _listed(arguments[0])
            _spend(len(items) * len(text))
            for item in items:
                _paid(item)
            return (items,)
        elif name in ("split", "rsplit") and arguments and isinstance(arguments[0], str) and arguments[0]:
            _spend(_ITEM * text.count(arguments[0]))
        elif name in ("split", "rsplit", "splitlines"):
            _spend(_ITEM // 2 * len(text))
    return arguments


_environment = _Environment()


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    return _environment.from_string(text)


class Sandbox:
    """A chat template, ready to render chats. Instances may be used by several threads at once.

    Raises:
        Exception: of any kind: the template is not valid, or holds what no chat template may.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise TemplateLimit(f"it is longer than {LONGEST_TEMPLATE:,} characters")
        _meter.start()
        self._template = _compiled(text)

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: list[Any] | None = None,
        *,
        prompt: bool = False,
        special: Mapping[str, Any],
    ) -> str:
        """Render one chat.

        Args:
            prompt: end with the header of the answer.
            special: the tokenizer's special tokens by name.

        Raises:
            TemplateLimit: the template asks for more than a chat can need.
            Exception: of any kind: what the template raises.
        """
        _meter.start()
        return self._template.render(
            messages=[_message(message) for message in messages],
            tools=_plain(tools),
            documents=None,
            add_generation_prompt=prompt,
            **special,
        )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value if type(value) is str else _plain(value) for name, value in message.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    if reasoning := next((kept[name] for name in _REASONING if name in kept), None):
        kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
    return kept


def _plain(value: Any) -> Any:
    """`value` rebuilt out of JSON's types: templates can reach no method of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str.__str__(value) if isinstance(value, str) else f"<{type(value).__name__}>"
