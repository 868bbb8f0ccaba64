"""How right an answer is, and how sure a share of right answers is."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

_Z = 1.96  # two-sided 95 %


def exact_match(answer: str, reference: str) -> bool:
    """Whether the whole answer is the reference.

    If the reference is a JSON object or array, both are compared as JSON: white space, key order and 22 or 22.0 do not
    matter, types do, and no key may stand twice. Else both are compared as texts without the white space around them.
    """
    try:
        wanted = _parse(reference)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict | list):
        return answer.strip() == reference.strip()
    try:
        return _parse(answer) == wanted
    except ValueError:
        return False


def wilson(right: int, rows: int) -> tuple[float, float]:
    """Answer the 95 % interval of a share of `right` among `rows`, both ends in 0..1 (Wilson 1927)."""
    share, spread = right / rows, _Z**2 / rows
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def paired_gain(gained: int, lost: int, rows: int) -> tuple[float, float, float]:
    """Answer by how much the share of right answers grew, and the 95 % interval of that, for the same rows twice.

    `gained` rows became right and `lost` rows became wrong. Normal approximation of the paired difference of
    proportions (McNemar's table), with Agresti and Min's half a row added to each cell (2005).
    """
    up, down, all_rows = gained + 0.5, lost + 0.5, rows + 2
    middle = (up - down) / all_rows
    half = _Z * math.sqrt(up + down - (up - down) ** 2 / all_rows) / all_rows
    return (gained - lost) / rows, max(-1.0, middle - half), min(1.0, middle + half)


def _parse(text: str) -> Any:
    # A number becomes a tuple, which JSON does not have: so true is not 1, and no digit is lost as in a float.
    return json.loads(text, parse_int=_number, parse_float=_number, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    answer = dict(pairs)
    if len(answer) < len(pairs):
        raise ValueError("a key stands twice")
    return answer


def _number(text: str) -> tuple[Decimal]:
    return (Decimal(text),)
