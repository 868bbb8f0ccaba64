from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from smidgen.evaluation.metrics import calibration_error, exact_match, macro_f1, paired_gain, same_words, word_f1
from smidgen.evaluation.tasks import best_answer
from smidgen.proofs import wilson


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


def test_macro_f1_is_the_mean_over_classes_that_occur():
    # Class 0: precision 2/3, recall 2/3. Class 1: 1/2, 1/2. Class 2 never occurs. Class 3: answered once, never right.
    confusion = np.array([[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    # scikit-learn 1.7: f1_score([0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 3, 0], average="macro")
    assert macro_f1(confusion) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "same", "f1"),
    [
        ("The Eiffel Tower.", "eiffel tower", True, 1.0),
        ("Eiffel Tower in Paris", "the Eiffel Tower", False, 2 * 2 / (4 + 2)),
        ("", "", True, 1.0),
        ("Rome", "", False, 0.0),
        ("to to be", "to be to", False, 1.0),
    ],
)
def test_short_answers_are_compared_as_squad_does(answer: str, reference: str, same: bool, f1: float):
    assert same_words(answer, reference) is same
    assert word_f1(answer, reference) == pytest.approx(f1)


def test_the_best_answer_is_in_the_context_and_in_order():
    spans = [None, None, (0, 3), (4, 7), (8, 12), None]
    low = [-9.0] * 6
    first, last = torch.tensor(low), torch.tensor(low)
    first[3], first[5], last[2], last[4] = 5.0, 9.0, 8.0, 4.0  # the largest ends are outside, or before the start
    assert best_answer("the sky blue", [(spans, torch.stack([first, last]))]) == "sky blue"
    first[0] = last[0] = 5.0
    assert best_answer("the sky blue", [(spans, torch.stack([first, last]))]) == ""
    other = torch.stack([first, last])
    other[:, 0] = 0.0  # a row has no answer only if every window says so
    windows = [(spans, torch.stack([first, last])), ([None, (0, 3), None, None, None, None], other)]
    assert best_answer("the sky blue", windows) == "sky blue"


def test_the_calibration_error_by_hand():
    chances, right = np.array([0.52, 0.54, 0.9, 1.0, 0.95, 0.96]), np.array([1, 0, 1, 1, 1, 0], dtype=bool)
    by_hand = (abs(1 - 1.06) + abs(1 - 0.9) + abs(2 - 2.91)) / 6  # bins of 0.05: two, one and three answers
    assert calibration_error(chances, right) == pytest.approx(by_hand)
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0
    assert calibration_error(np.array([0.75] * 4), np.array([True, True, True, False])) == 0
