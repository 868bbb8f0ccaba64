"""What in a chat template a person should look at: words that depend on what a user writes, and addresses.

A template can answer some users otherwise than others and still be a valid template; no sandbox can tell. See "The
chat template backdoor", Pillar Security, 2025.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jinja2 import TemplateError, nodes

from smidgen.data.sandbox import parsed

_ADDRESS = re.compile(r"https?://|www\.|data:[a-z]+/|<script|<iframe", re.IGNORECASE)
_MARKERS = re.compile(r"</?[a-z_ ]+>|<\|.*\|>|\[/?[A-Z_]+\]")  # of reasoning and tools, which templates look for


def suspicious(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and finding: conditions on the words of a message, addresses, and where the date is read."""
    for number, line in enumerate(text.splitlines(), 1):
        if found := _ADDRESS.search(line):
            yield number, f"it writes an address or markup ({found[0]})"
    try:
        tree = parsed(text)
    except TemplateError as error:
        yield getattr(error, "lineno", None) or 1, f"it cannot be read: {error}"
        return
    aliases = {"content"} | {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _reads(node.node, {"content"})
    }
    for test in _conditions(tree):
        words = [const.value for const in test.find_all(nodes.Const) if isinstance(const.value, str)]
        telling = [word for word in words if word.strip() and not _MARKERS.search(word) and word not in _ROLES]
        if _reads(test, aliases) and telling:
            yield test.lineno, f"it looks for {', '.join(map(repr, telling))} in what is written"
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now":
            yield call.lineno, "it reads the date, so the same chat is another text tomorrow"


_ROLES = frozenset("role content type text name user assistant system tool developer function".split())


def _conditions(tree: nodes.Template) -> Iterator[nodes.Node]:
    for node in tree.find_all((nodes.If, nodes.CondExpr, nodes.For)):
        if test := getattr(node, "test", None):
            yield test


def _reads(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression reads the words of a message, by `content` or a name that stands for them."""
    found = [node, *node.find_all((nodes.Getattr, nodes.Getitem, nodes.Name))]
    for part in found:
        if isinstance(part, nodes.Getattr) and part.attr in names:
            return True
        if isinstance(part, nodes.Getitem) and isinstance(part.arg, nodes.Const) and part.arg.value in names:
            return True
        if isinstance(part, nodes.Name) and part.name in names:
            return True
    return False
