from __future__ import annotations

import itertools

import pytest

from smidgen.evaluation.metrics import exact_match, paired_gain, wilson


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ('{"b": 22.0,"a":"x"}', '{"a": "x", "b": 22}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 12345678901234567891}', '{"a": 12345678901234567890}', False),
        ('{"a": 0.1}', '{"a": 0.10}', True),
        ('{"a": 2, "a": 1}', '{"a": 1}', False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1} and more', '{"a": 1}', False),
        ('{"a": 1', '{"a": 1}', False),
        ("  Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ("12.0", "12", False),  # a bare number is a text: only objects and arrays are compared as JSON
    ],
)
def test_exact_match(answer: str, reference: str, right: bool):
    assert exact_match(answer, reference) is right


def test_wilson_against_its_definition():
    # The ends are the shares p with |right / rows - p| = 1.96 * sqrt(p (1 - p) / rows).
    for right, rows in ((0, 10), (3, 10), (119, 120), (120, 120)):
        for end in wilson(right, rows):
            if 0 < end < 1:
                assert (right / rows - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / rows, rel=1e-9)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # the worked example of Newcombe 1998


def test_paired_gain_covers_the_truth():
    # Exact coverage over all outcomes of 40 pairs, of which 30 % gain and 10 % lose: close to 95 %.
    from math import comb

    rows, up, down, covered = 40, 0.3, 0.1, 0.0
    for gained, lost in itertools.product(range(rows + 1), repeat=2):
        if gained + lost <= rows:
            chance = comb(rows, gained) * comb(rows - gained, lost)
            chance *= up**gained * down**lost * (1 - up - down) ** (rows - gained - lost)
            gain, low, high = paired_gain(gained, lost, rows)
            assert gain == (gained - lost) / rows and low <= gain <= high
            covered += chance * (low <= up - down <= high)
    assert 0.93 < covered < 0.975
