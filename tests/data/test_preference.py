import json

import pytest

from smidgen.data.formats import detect_format
from smidgen.data.preference import (
    LABELLED,
    PAIRS,
    Labelled,
    Pair,
    answer_example,
    paired,
    read_preferences,
    unpaired,
)
from smidgen.data.read import read_rows
from smidgen.errors import DataError
from tests.data.conftest import assistant, system, user


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def convert(*rows, **options):
    return read_preferences("d.jsonl", iter(enumerate(rows, 1)), **options)


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
CHAT = [user("a"), assistant("b"), user("c")]

# Format, row, prompt; the chosen answer is always "good", the rejected one "bad".
CASES = {
    "texts": ("prompt/chosen/rejected", {"prompt": "c", "chosen": "good", "rejected": "bad"}, [user("c")]),
    "question and system": (
        "question/chosen/rejected",
        {"system": "s", "question": "c", "chosen": "good", "rejected": "bad"},
        [system("s"), user("c")],
    ),
    "messages": (
        "prompt/chosen/rejected",
        {"prompt": CHAT, "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        CHAT,
    ),
    "text and one message": (
        "prompt/chosen/rejected",
        {"prompt": "c", "chosen": assistant("good"), "rejected": assistant("bad")},
        [user("c")],
    ),
    "whole chats": (
        "chosen/rejected",
        {"chosen": [*CHAT, assistant("good")], "rejected": [*CHAT, assistant("bad")], "system": "s"},
        [system("s"), *CHAT],
    ),
    "whole chats beside their prompt": (
        "prompt/chosen/rejected",
        {"prompt": "c", "chosen": [user("c"), assistant("good")], "rejected": [user("c"), assistant("bad")]},
        [user("c")],
    ),
    "whole texts": ("chosen/rejected", {"chosen": "I say good", "rejected": "I say bad"}, [user("I say")]),
    "transcripts": (
        "chosen/rejected",
        {"chosen": f"{HH}\n\nAssistant: good", "rejected": f"{HH}\n\nAssistant: bad"},
        CHAT,
    ),
    "a transcript as prompt": (
        "prompt/chosen/rejected",
        {"prompt": f"{HH}\n\nAssistant:", "chosen": "good", "rejected": "bad"},
        CHAT,
    ),
    "alpaca": (
        "instruction/chosen/rejected",
        {"instruction": "c", "input": "d", "history": [["a", "b"]], "chosen": "good", "rejected": "bad"},
        [user("a"), assistant("b"), user("c\n\nd")],
    ),
    "sharegpt": (
        "conversations/chosen/rejected",
        {"conversations": [human("a"), gpt("b"), human("c")], "chosen": gpt("good"), "rejected": gpt("bad")},
        CHAT,
    ),
    "in the order of showing": (
        "prompt/response_0/response_1/better_response_id",
        {"prompt": "c", "response_0": "bad", "response_1": "good", "better_response_id": 1},
        [user("c")],
    ),
    "arena": (
        "conversation_a/conversation_b/winner",
        {
            "conversation_a": [*CHAT, assistant("good")],
            "conversation_b": [*CHAT, assistant("bad")],
            "winner": "model_a",
        },
        CHAT,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_shape_of_a_pair(case):
    name, row, prompt = CASES[case]
    found = convert(row)
    assert found.format.name == name
    assert not found.ignored
    (pair,) = found.examples
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, [assistant("good")], [assistant("bad")])
    assert pair.line == 1


def test_what_else_a_pair_holds():
    row = {"prompt": "c", "chosen": "good", "rejected": "bad", "margin": 2, "tools": [{"name": "t"}], "id": 7}
    found = convert(row)
    assert (found.examples[0].margin, found.examples[0].tools) == (2, [{"name": "t"}])
    assert found.ignored == {"id": 1}
    shown = {name: convert(CASES[name][1]).examples[0].chosen_first for name in CASES}
    assert {name: first for name, first in shown.items() if first is not None} == {
        "in the order of showing": False,
        "arena": True,
    }


def test_answers_of_several_turns_keep_them():
    turns = [assistant("good"), user("more?"), assistant("yes")]
    (pair,) = convert({"chosen": [*CHAT, *turns], "rejected": [*CHAT, assistant("bad")]}).examples
    assert pair.prompt == CHAT and pair.chosen == turns


def test_every_format_is_reached_by_its_own_fields():
    for formats in (PAIRS, LABELLED):
        for format in formats.values():
            assert detect_format(format.needs, "here", formats=formats) is format


def node(role, text, *replies, **more):
    return {"role": role, "text": text, "replies": list(replies), **more}


def test_a_tree_gives_a_pair_for_each_two_ranked_replies():
    follow = node("prompter", "more", node("assistant", "x", rank=1), node("assistant", "y", rank=0))
    replies = [
        node("assistant", "second", follow, rank=1),
        node("assistant", "first", rank=0),
        node("assistant", "third", rank=2),
        node("assistant", "not ranked", rank=None),
    ]
    found = convert(
        {"message_tree_id": "t", "prompt": node("prompter", "q", *replies)},
        {"message_tree_id": "t", "prompt": node("prompter", "q", replies[3])},
    )
    pairs = [(len(p.prompt), p.chosen[0]["content"], p.rejected[0]["content"]) for p in found.examples]
    assert pairs == [(1, "first", "second"), (1, "first", "third"), (1, "second", "third"), (3, "y", "x")]
    assert found.examples[3].prompt == [user("q"), assistant("second"), user("more")]
    assert found.unusable.lines == {"no two replies to a message are ranked": ["2"]}
    with pytest.raises(DataError, match="2: a message of the tree must be an object with a 'text'"):
        convert({"message_tree_id": "t", "prompt": node("prompter", "q", *replies)}, {"message_tree_id": "t"})
    with pytest.raises(DataError, match="65 ranked replies to one message; at most 64"):
        many = [node("assistant", f"{rank}", rank=rank) for rank in range(65)]
        convert({"message_tree_id": "t", "prompt": node("prompter", "q", *many)})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "no known format has the fields chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' must be text or messages, got null"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "field 'prompt' must be text or messages, got number"),
        ({"prompt": "a", "chosen": [3], "rejected": "c"}, r"chosen\[0\] must be an object, got number"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "field 'margin' must be a number, got text"),
        ({"conversation_a": [], "conversation_b": [], "winner": "c"}, "'winner' must be one of a, b, .*got 'c'"),
        ({"message_tree_id": 1, "prompt": "a"}, "a message of the tree must be an object with a 'text'"),
        (
            {"prompt": "other", "chosen": [user("c"), assistant("a")], "rejected": [user("c"), assistant("b")]},
            "whole chats, but the prompt is not the beginning of both",
        ),
    ],
)
def test_rows_of_a_wrong_type_are_mistakes(row, words):
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*" + words):
        convert(row)


def test_rows_without_rejected_are_mistakes_told_together():
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"d\.jsonl:2: field 'rejected' is missing\. \(2 rows like this: 2, 3\)"):
        convert(good, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "empty chosen"),
        ({"prompt": "a", "chosen": "b", "rejected": []}, "empty rejected"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "empty prompt"),
        ({"prompt": [user("c"), assistant("d")], "chosen": "b", "rejected": "c"}, "roles out of order"),
        ({"prompt": [user("c")], "chosen": [*CHAT], "rejected": [*CHAT, assistant("c")]}, "empty chosen"),
    ],
)
def test_pairs_that_say_nothing_are_left_out_and_counted(row, reason):
    found = convert({"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    assert len(found.examples) == 1
    ((told, lines),) = found.unusable.lines.items()
    assert told.startswith(reason) and lines == ["2"]


def test_ties_and_chats_without_a_common_prompt_are_left_out():
    tie = {"conversation_a": CHAT, "conversation_b": CHAT, "winner": "tie (bothbad)"}
    assert convert(tie).unusable.lines == {"a tie": ["1"]}
    apart = {"chosen": "yes sir", "rejected": "no sir"}
    assert convert(apart).unusable.lines == {"chosen and rejected do not begin with a prompt in common": ["1"]}
    other = {"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]}
    assert convert(other).unusable.lines == {"chosen does not begin and end with a turn of the assistant": ["1"]}


@pytest.mark.parametrize(
    ("row", "prompt", "desirable"),
    [
        ({"prompt": "c", "completion": "x", "label": True}, [user("c")], True),
        ({"prompt": CHAT, "completion": [assistant("x")], "label": False}, CHAT, False),
        ({"instruction": "c", "input": "d", "output": "x", "kto_tag": "false"}, [user("c\n\nd")], False),
        ({"messages": [*CHAT, assistant("x")], "label": "1"}, CHAT, True),
        ({"conversations": [human("c"), gpt("x")], "kto_tag": 0}, [user("c")], False),
    ],
)
def test_every_shape_of_a_labelled_row(row, prompt, desirable):
    assert convert(row, labelled=True).examples == [Labelled(1, prompt, [assistant("x")], desirable)]


def test_labelled_rows_that_are_wrong_or_useless():
    with pytest.raises(DataError, match=r"d\.jsonl:1: field 'label' must be true or false, got 'maybe'"):
        convert({"prompt": "a", "completion": "b", "label": "maybe"}, labelled=True)
    found = convert({"prompt": "a", "completion": "", "label": True}, labelled=True)
    assert found.unusable.lines == {"empty answer": ["1"]}


def test_pairs_become_labelled_rows_and_come_back():
    rows = [{"prompt": p, "chosen": f"good {n}", "rejected": f"bad {n}"} for n, p in enumerate("aab")]
    pairs = convert(*rows).examples
    labelled = unpaired(pairs)
    assert [row.desirable for row in labelled] == [True, False] * 3
    assert paired(labelled) == (pairs, [])
    assert paired(reversed(labelled)) == (pairs, [])


def test_rows_that_find_no_other_are_handed_back():
    rows = [
        Labelled(1, [user("a")], [assistant("x")], True),
        Labelled(2, [user("a")], [assistant("x")], False),  # equal answers say nothing
        Labelled(3, [user("b")], [assistant("y")], False),
        Labelled(4, [user("a")], [assistant("z")], False),
    ]
    pairs, left = paired(rows)
    assert pairs == [Pair(1, [user("a")], [assistant("x")], [assistant("z")])]
    assert [row.line for row in left] == [2, 3]


def test_of_an_example_the_answer_alone_is_learned():
    example = answer_example(5, CHAT, [assistant("x")], None)
    assert example.messages == [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("x")]
    assert CHAT[1] == assistant("b")


@pytest.mark.parametrize(
    ("file", "name", "rows", "examples"),
    [
        ("truthfulqa/pairs_derived.jsonl", "prompt/chosen/rejected", 790, 790),
        ("llamafactory_demo/dpo_en_demo.json", "conversations/chosen/rejected", 299, 299),
        ("llamafactory_demo/kto_en_demo.json", "messages/label", 300, 300),
        ("open_assistant_sample/en_100_tree.jsonl", "tree", 100, 0),
    ],
)
def test_files_as_they_are_found(test_data, file, name, rows, examples):
    path = test_data / "data" / file
    found = read_preferences(file, read_rows(path), labelled="kto" in file)
    assert found.format.name == name
    if name == "tree":
        ranks = [
            len([reply for reply in message["replies"] if reply.get("rank") is not None])
            for tree in map(json.loads, path.read_text(encoding="utf-8").splitlines())
            for message in messages_of(tree["prompt"])
            if message["role"] == "prompter"
        ]
        examples = sum(count * (count - 1) // 2 for count in ranks)
        assert examples > 500
    assert len(found.examples) == examples
    assert len({example.line for example in found.examples}) + found.unusable.count() == rows


def messages_of(message):
    return [message, *(below for reply in message["replies"] for below in messages_of(reply))]
