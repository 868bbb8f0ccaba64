"""Chat templates are foreign programs: here they render without reach and within bounds.

The language is the one that transformers gives to chat templates (Jinja's immutable sandbox, `tojson`,
`raise_exception`, `strftime_now`, `{% generation %}`, loop controls); what a chat may cost is in `data.metering`.
"""

from __future__ import annotations

import functools
import operator
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from smidgen.data.metering import (
    METER,
    OPERATORS,
    SHORT,
    TemplateLimit,
    before_method,
    check_format,
    joined,
    listed,
    metered,
    paid,
    step,
    stepping,
    to_json,
)

LONGEST_TEMPLATE = 200_000  # characters

_FILTERS = (
    "abs batch capitalize center count d default dictsort e escape first float format groupby indent int items join "
    "last length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort "
    "string sum title tojson trim truncate unique upper wordcount"
).split()

# Methods of text that make much out of little, and that no chat template needs.
_DENIED = frozenset("center ljust rjust zfill expandtabs translate encode format_map to_bytes".split())

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the usual one first


# ---- globals ----


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message)[:500])


def _strftime_now(format: str) -> str:
    if len(format) > SHORT or re.search(r"\d{3}", format):
        raise TemplateLimit("strftime_now: the format is long, or has a width")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without what else a type can do."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(listed(keys), value)


class _Namespace(Namespace):
    """A namespace that takes no names with a leading underscore, and whose text does not show what is in it."""

    def __init__(*arguments: Any, **named: Any) -> None:
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
    return value if type(value) is str else paid(value)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    step, paid, joined = staticmethod(step), staticmethod(paid), staticmethod(joined)
    concat = staticmethod(joined)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_shown, cache_size=0
        )
        self.filters["tojson"] = to_json
        self.filters = {name: metered(name, self.filters[name]) for name in _FILTERS}
        self.filters["_tested"] = stepping(operator.truth)
        self.tests = {name: stepping(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.binop_table |= OPERATORS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        if other := next(template.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None):
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
            check_format(text, "{", (arguments, named))
            return wrapped(*arguments, **named)

        return None if value.__name__ in _DENIED else formatted

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        step()
        if isinstance(__obj, Macro):
            return super().call(__context, __obj, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        if isinstance(__obj, types.BuiltinMethodType):
            args = before_method(__obj, args)
        answer = super().call(__context, __obj, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        return paid(answer) if isinstance(answer, str | list | tuple | dict) else answer


_environment = _Environment()


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # Python's, about the foreign program
        return _environment.from_string(text)


def parsed(text: str) -> nodes.Template:
    """The syntax tree of a chat template.

    Raises:
        jinja2.TemplateError: it is not valid, too long, or nested too deeply.
    """
    if len(text) > LONGEST_TEMPLATE:
        raise TemplateLimit(f"it is longer than {LONGEST_TEMPLATE:,} characters")
    try:
        return _environment.parse(text)
    except RecursionError:
        raise TemplateLimit("it is nested too deeply") from None


class Sandbox:
    """A chat template, ready to render chats. Instances may be used by several threads at once.

    Raises:
        Exception: of any kind: the template is not valid, or holds what no chat template may.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST_TEMPLATE:
            raise TemplateLimit(f"it is longer than {LONGEST_TEMPLATE:,} characters")
        METER.start()
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
        METER.start()
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
