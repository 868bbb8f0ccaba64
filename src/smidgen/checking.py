"""Plain mappings checked against dataclasses, with pydantic's findings told in plain words at their place."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from smidgen.drafts import Draft, Place, dotted
from smidgen.errors import SmidgenError, did_you_mean
from smidgen.foreign import shown

_WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list",
    "dict_type": "must be a mapping of fields to values",
    "dataclass_type": "must be a mapping of fields to values",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def build(kind: type, data: Any) -> Any:
    """Answer a `kind`, a dataclass, made of plain `data`, by JSON's strict rules: no text for a number, no true for 1.

    Raises:
        pydantic.ValidationError: `data` does not fit.
    """
    return _adapter(kind).validate_json(json.dumps(data, default=str), strict=True)


def check(draft: Draft, kind: type, data: Any, place: Place, unknown: Callable[[Place, str], str]) -> Any:
    """Answer a `kind` made of `data`; or None, after noting in `draft` all that is wrong.

    Args:
        place: where `data` stands in the draft.
        unknown: answers what to say about a field that does not exist, given where it stands and its name.
    """
    try:
        return build(kind, data)
    except ValidationError as error:
        for finding in error.errors(include_url=False):
            where = place + _locate(data, finding["loc"])[0]
            if finding["type"] == "missing":
                draft.problem(where, f"{dotted(where) or 'recipe'}: the field '{finding['loc'][-1]}' is missing")
            elif finding["type"] == "unexpected_keyword_argument":
                draft.problem(where, f"{dotted(where[:-1]) or 'recipe'}: {unknown(where[:-1], str(where[-1]))}")
        for where, message in wrong_values(error, data):
            draft.problem(place + where, f"{dotted(place + where)}: {message}")
    except SmidgenError as error:  # of the dataclass's own checks
        draft.problem(place, f"{dotted(place)}: {error}")
    return None


def wrong_values(error: ValidationError, data: Any) -> Iterator[tuple[Place, str]]:
    """Yield where in `data` a value is wrong, and what it must be instead."""
    wrong: dict[Place, list[str]] = {}  # a value that fits no member of a union has a finding for each
    for finding in error.errors(include_url=False):
        if finding["type"] not in ("missing", "unexpected_keyword_argument"):
            wrong.setdefault(_locate(data, finding["loc"])[0], []).append(_wanted(finding))
    for where, wanted in wrong.items():
        value = _locate(data, where)[1]
        first, *others = dict.fromkeys(wanted)
        told = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
        near = did_you_mean(str(value), re.findall(r"'([^']*)'", told))
        yield where, f"{told}, got {_told(value)}{near}"


@functools.cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _locate(data: Any, steps: Place) -> tuple[Place, Any]:
    """Follow those of pydantic's `steps` that lead into `data`; the others name members of unions."""
    place: Place = ()
    for step in steps:
        if (isinstance(data, dict) and step in data) or (isinstance(data, list) and isinstance(step, int)):
            data, place = data[step], (*place, step)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return place, data


def _wanted(finding: Any) -> str:
    if finding["type"] == "value_error":
        return str(finding["ctx"]["error"])
    return _WORDS.get(finding["type"]) or re.sub(r"^\w+ should", "must", finding["msg"])


def _told(value: Any) -> str:
    kinds: dict[type, str] = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return kinds.get(type(value)) or shown(json.dumps(value, default=str, ensure_ascii=False))
