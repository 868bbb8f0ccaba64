"""How right an answer is, and how sure a share of right answers is."""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from decimal import Decimal
from typing import Any

import numpy as np

from smidgen.proofs import Z


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


def paired_gain(gained: int, lost: int, rows: int) -> tuple[float, float, float]:
    """Answer by how much the share of right answers grew, and the 95 % interval of that, for the same rows twice.

    `gained` rows became right and `lost` rows became wrong. Normal approximation of the paired difference of
    proportions (McNemar's table), with Agresti and Min's half a row added to each cell (2005).
    """
    up, down, all_rows = gained + 0.5, lost + 0.5, rows + 2
    middle = (up - down) / all_rows
    half = Z * math.sqrt(up + down - (up - down) ** 2 / all_rows) / all_rows
    return (gained - lost) / rows, max(-1.0, middle - half), min(1.0, middle + half)


def calibration_error(chances: np.ndarray, right: np.ndarray, bins: int = 10) -> float:
    """How far the certainty of answers is from how often they are right: the expected calibration error.

    The mean, over all answers, of |share that is right - mean certainty| of their bin. https://arxiv.org/abs/1706.04599

    Args:
        chances: (N,) the certainty of each of two possible answers, 0.5 to 1; the bins are of equal width there.
        right: (N,) bool.
    """
    places = np.minimum((2 * chances - 1) * bins, bins - 1).astype(int)
    gaps = [abs((right[places == at] - chances[places == at]).sum()) for at in range(bins)]
    return float(sum(gaps) / len(chances))


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 of all classes that are right somewhere or answered somewhere.

    Args:
        confusion: (C, C), how often the class of the row was answered by that of the column.
    """
    hits, rights, answered = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    there = rights + answered > 0
    return float((2 * hits[there] / (rights + answered)[there]).mean())


def same_words(answer: str, reference: str) -> bool:
    """Whether two short answers are the same but for case, punctuation and articles (SQuAD's exact match)."""
    return _words(answer) == _words(reference)


def word_f1(answer: str, reference: str) -> float:
    """The F1 of the words of two short answers, counted without case, punctuation and articles (SQuAD)."""
    found, wanted = _words(answer), _words(reference)
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return [word for word in kept.split() if word not in ("a", "an", "the")]


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
