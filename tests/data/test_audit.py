import random
from collections import Counter
from pathlib import Path

import pytest

from smidgen.data.audit import audit_preferences, near_duplicates, near_groups
from smidgen.data.formats import FileRows
from smidgen.data.preference import read_preferences
from smidgen.data.read import read_rows


def pairs(*texts: str, path: str = "t.jsonl") -> FileRows:
    """Pairs written as 'prompt / chosen / rejected'."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), text.split(" / "))) for text in texts]
    return read_preferences(path, iter(enumerate(rows, 1)))


def labelled(*rows: tuple[str, str, bool]) -> FileRows:
    fields = [dict(zip(("prompt", "completion", "label"), row)) for row in rows]
    return read_preferences("t.jsonl", iter(enumerate(fields, 1)), labelled=True)


def test_length_bias_and_the_classifier_that_sees_lengths_alone():
    found = audit_preferences(
        [pairs("p / long / no", "p / longer / no", "p / short / longest", "p / yes / not")],
        [pairs("q / a / bb", "q / aaa / bb", "q / a / bbbb", path="e.jsonl")],
    )
    assert (found.lengths.longer, found.lengths.shorter, found.lengths.rows) == (0.5, 0.25, 4)
    assert found.lengths.accuracy(True) == 0.625 and found.lengths.accuracy(False) == 0.375
    assert found.lines()[0] == (
        "length: the better answer is the longer one in 50.0%, the shorter one in 25.0% of 4 rows; "
        "to take the longer one is right in 62.5%, in evaluation in 33.3%"
    )


def test_length_bias_of_labelled_rows_counts_all_their_pairs():
    rows = [("a", "xx", True), ("b", "xxxx", True), ("c", "xx", False), ("d", "xxx", False), ("e", "x", False)]
    lengths = audit_preferences([labelled(*rows)]).lengths
    assert (lengths.longer, lengths.shorter) == pytest.approx((4 / 6, 1 / 6))
    assert audit_preferences([labelled(*rows[:2])]).lengths is None


def test_position_bias_where_the_order_is_known():
    row = {"prompt": "p", "response_0": "a", "response_1": "b"}
    rows = [{**row, "better_response_id": better} for better in (0, 0, 1)]
    found = audit_preferences([read_preferences("t.jsonl", iter(enumerate(rows, 1)))])
    assert found.chosen_first == (2, 3)
    assert "position: the better answer was shown first in 66.7% of 3 pairs" in found.lines()
    assert not any(line.startswith("position") for line in audit_preferences([pairs("p / a / b")]).lines())


def test_duplicates_and_contradictions_name_both_places():
    found = audit_preferences(
        [pairs("p / a / b", "p / a / b", "p / b / a", "q / b / a", "p / a / c"), pairs("q / a / b", path="u")]
    )
    assert found.duplicates == [("t.jsonl:2", "t.jsonl:1")]
    assert found.contradictions == [("t.jsonl:3", "t.jsonl:1"), ("u:1", "t.jsonl:4")]
    assert "duplicates: 1 rows repeat an earlier one (t.jsonl:2 of t.jsonl:1)" in found.lines()
    both = audit_preferences([labelled(("p", "a", True), ("p", "a", False), ("p", "b", False), ("p", "b", False))])
    assert both.contradictions == [("t.jsonl:2", "t.jsonl:1")]
    assert both.duplicates == [("t.jsonl:4", "t.jsonl:3")]


def test_near_duplicates_between_train_and_eval():
    train = pairs("What is the largest city of France? / a / b", "Name a colour / a / b")
    evaluation = pairs(
        "what is the largest city of Spain / x / y", "A colour, name! / x / y", "Name a COLOUR. / x / y", path="e"
    )
    found = audit_preferences([train], [evaluation])
    assert [(near.place, near.other) for near in found.near] == [("e:1", "t.jsonl:1"), ("e:3", "t.jsonl:2")]
    assert [near.similarity for near in found.near] == pytest.approx([5 / 7, 1.0])
    assert found.lines()[-1] == (
        "overlap: 2 evaluation rows have nearly a training row's prompt "
        "(e:1 of t.jsonl:1 (0.71), e:3 of t.jsonl:2 (1.00))"
    )


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_near_duplicates_are_those_that_comparing_all_finds(width, threshold):
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdef", k=draw.randrange(0, 11))) for _ in range(120)]
    rows, others = [
        [(f"{name}{at}", text) for at, text in enumerate(part)] for name, part in (("r", texts[:40]), ("o", texts[40:]))
    ]

    def similarity(one: str, other: str) -> float:
        sets = []
        for words in (one.split(), other.split()):
            runs = [" ".join(words[at : at + width]) for at in range(len(words)) if at + width <= len(words)]
            sets.append(set(runs or ([" ".join(words)] if words else [])))
        return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))

    expected = {place: max(similarity(text, other) for _, other in others) for place, text in rows}
    expected = {place: best for place, best in expected.items() if best >= threshold}
    found = {near.place: near.similarity for near in near_duplicates(rows, others, width=width, threshold=threshold)}
    assert found == pytest.approx(expected)
    assert expected or threshold == 1.0


def test_truthfulqa_as_it_is(test_data: Path):
    path = test_data / "data" / "truthfulqa" / "pairs_derived.jsonl"
    found = read_preferences("pairs", read_rows(path))
    report = audit_preferences([found])
    lengths = [(len(pair.chosen[0]["content"]), len(pair.rejected[0]["content"])) for pair in found.examples]
    counts = Counter((a > b) - (a < b) for a, b in lengths)
    assert report.lengths.longer == counts[1] / 790
    assert report.lengths.accuracy(True) == pytest.approx((counts[1] + counts[0] / 2) / 790)
    assert 0.6 < report.lengths.accuracy(True) < 0.65
    assert report.contradictions == []


def test_texts_that_are_near_share_a_group():
    texts = ["what is the sky", "why do cats purr", "what is the sky made of", "the sky made of gas", "", ""]
    assert near_groups(texts) == [[0, 2, 3], [1], [4], [5]]  # 0 and 3 are not near, and both are near to 2
    assert near_groups(texts, threshold=1.0) == [[0], [1], [2], [3], [4], [5]]
