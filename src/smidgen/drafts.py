"""YAML read with the place of every value, so that each mistake can be reported with its line.

Of the language's features, what a recipe needs: one document of plain values, lists and mappings, and few aliases.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from smidgen.errors import RecipeError, did_you_mean, raise_all
from smidgen.foreign import is_unicode, read_text, shown

Place: TypeAlias = tuple[str | int, ...]  # where a value stands: ("data", "train", 0, "path")

_MAX_BYTES = 100_000  # a recipe has some three thousand
_MAX_NODES = 10_000  # a recipe has some fifty; aliases can make a small file huge
_DEEPEST, _MOST_BRACKETS = 32, 100
_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_LARGEST_BITS = 64
_LAST = 10**9  # mistakes that stand on no line are told after those that do


def dotted(place: Place) -> str:
    """Answer a place as it is written in messages and overrides: ``data.train[0].path``."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".")


@dataclass
class Draft:
    """A YAML file on its way to a recipe: its data, where each value comes from, and what was found wrong.

    origins: what to name instead of a line, for values that do not come from the file.
    """

    path: Path
    data: dict[str, Any] = field(default_factory=dict)
    lines: dict[Place, int] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def problem(self, place: Place, message: str) -> None:
        """Note a mistake at the nearest known position at or above `place`."""
        while place and place not in self.lines and place not in self.origins:
            place = place[:-1]
        if place in self.origins:
            self.problems.append((_LAST, f"{self.origins[place]}: {message}"))
        else:
            self.problem_on(self.lines.get(place, 1), message)

    def problem_on(self, line: int, message: str) -> None:
        """Note a mistake on a line of the file."""
        self.problems.append((line, f"{self.path}:{line}: {message}"))

    def raise_problems(self) -> None:
        """Raise one `RecipeError` with all problems in the order of their lines, if there are any."""
        raise_all(RecipeError, [message for _, message in sorted(self.problems, key=lambda problem: problem[0])])

    def move(self, old: Place, new: Place) -> None:
        """Let what is known about the positions of `old` and below hold for `new`."""
        tables: list[dict[Place, Any]] = [self.lines, self.origins]
        for known in tables:
            for place in [place for place in known if place[: len(old)] == old]:
                known[new + place[len(old) :]] = known.pop(place)

    def override(self, text: str) -> None:
        """Set the value that ``key.path=value`` names; the value is read as YAML."""
        origin = f"override '{text}'"
        path, equals, written = text.partition("=")
        place = tuple(path.strip().split("."))
        if not equals or not all(place):
            self.problems.append((_LAST, f"{origin}: must be of the form key.path=value, such as train.epochs=3"))
            return
        read = Draft(self.path)
        try:
            value = _value(written, read)
        except (yaml.YAMLError, RecipeError, RecursionError):
            value = None
            read.problem((), "not valid YAML")
        if read.problems:
            self.problems.append((_LAST, f"{origin}: the value is not valid YAML"))
            return
        into: Any = self.data
        for depth, step in enumerate(place[:-1], 1):
            if step not in into:
                into[step] = {}
                self.origins[place[:depth]] = origin
            into = into[step]
            if not isinstance(into, dict):
                self.problems.append((_LAST, f"{origin}: '{dotted(place[:depth])}' has no fields"))
                return
        into[place[-1]] = value
        for known in (self.lines, self.origins):  # what stood there before no longer counts
            for below in [below for below in known if below[: len(place)] == place]:
                del known[below]
        self.origins[place] = origin


class _Loader(yaml.SafeLoader):
    """The safe loader, which also reads 2e-4 as a number (YAML 1.1 wants 2.0e-4 there)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_draft(path: Path) -> Draft:
    """Read a YAML file that holds one mapping.

    Raises:
        RecipeError: the file cannot be read at all. Lesser mistakes are noted in the draft.
    """
    draft = Draft(path)
    try:
        if not os.path.exists(path):
            near = did_you_mean(path.name, [other.name for other in path.parent.glob("*.y*ml")])
            raise RecipeError(f"{path}: no such file{near}")
        value = _value(_flat(read_text(path, RecipeError, _MAX_BYTES)), draft)
        if value is None:
            raise RecipeError(f"{path}: the file is empty; a recipe needs model, adapter, data and output")
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply, or an alias that contains itself") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}:1: a recipe is a mapping of fields to values, such as 'model: gpt2'")
    draft.data = value
    return draft


def _flat(text: str) -> str:
    """Answer `text`, if its brackets are not nested absurdly: the YAML reader would take long to give up."""
    depth = 0
    for bracket in re.findall(r"[\[{}\]]", text):
        depth = max(0, depth + (1 if bracket in "[{" else -1))
        if depth > _MOST_BRACKETS:
            raise RecursionError
    return text


def _value(text: str, draft: Draft) -> Any:
    """The value of a YAML text; None where there is none."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return None if node is None else _Reader(loader, draft).value(node, ())


class _Reader:
    """Builds values from YAML nodes and writes down the line of each."""

    def __init__(self, loader: _Loader, draft: Draft):
        self.loader, self.draft, self.nodes = loader, draft, 0

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise RecipeError(f"{self.draft.path}: more than {_MAX_NODES:,} values, aliases counted; this is no recipe")
        if len(place) > _DEEPEST:
            raise RecipeError(
                f"{self.draft.path}: nested too deeply, more than {_DEEPEST} levels, or an alias that contains itself"
            )
        self.draft.lines.setdefault(place, node.start_mark.line + 1)
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN:
            self.draft.problem(place, f"{dotted(place)}: the YAML tag '{node.tag}' is not read")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        try:
            value = self.loader.construct_object(node)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:  # dates, tags
            self.draft.problem(place, f"{dotted(place)}: cannot be read: {shown(error)}")
            return None
        if isinstance(value, int) and value.bit_length() > _LARGEST_BITS:
            self.draft.problem(place, f"{dotted(place)}: the number has more than {_LARGEST_BITS} bits")
            return None
        if isinstance(value, str) and not is_unicode(value):
            self.draft.problem(place, f"{dotted(place)}: holds half of a character, such as \\ud800 alone")
            return None
        return value

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not is_unicode(key_node.value):
                self.draft.problem_on(line, "a field name must be plain text")
                continue
            key = key_node.value
            if key in mapping:
                here = (*place, key)
                self.draft.problem_on(
                    line, f"{dotted(here)}: given twice, first on line {self.draft.lines[here]}; keep one"
                )
                continue
            self.draft.lines[(*place, key)] = line
            mapping[key] = self.value(value_node, (*place, key))
        return mapping
