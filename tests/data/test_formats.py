import pytest

from smidgen.data.formats import FORMATS, convert_rows, detect_format, named_format
from smidgen.errors import DataError
from tests.data.conftest import assistant, system, user


def convert(*rows, **options):
    return convert_rows("d.jsonl", iter(enumerate(rows, 1)), format=None, **options)


CASES = {
    "alpaca": (
        {"instruction": "Add", "input": "1, 2", "output": "3", "history": [["hi", "ho"]], "system": "Be kind"},
        [system("Be kind"), user("hi"), assistant("ho"), user("Add\n\n1, 2"), assistant("3")],
    ),
    "dolly": (
        {"instruction": "Sum up", "context": "A text", "response": "Short", "category": "x"},
        [user("Sum up\n\nA text"), assistant("Short")],
    ),
    "sharegpt": (
        {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        [system("S"), user("a"), assistant("b")],
    ),
    "messages": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, assistant("b")]},
        [user("a"), assistant("b")],
    ),
    "prompt/completion": ({"prompt": "a", "completion": "b"}, [user("a"), assistant("b")]),
    "question/answer": ({"question": "a", "answer": "b"}, [user("a"), assistant("b")]),
}


@pytest.mark.parametrize("name", CASES)
def test_formats_are_detected_and_become_messages(name):
    row, messages = CASES[name]
    found = convert(row)
    assert found.format.name == name
    assert found.examples[0].messages == messages


def test_text_is_detected_and_wins_for_pretraining():
    assert convert({"text": "once"}).examples[0].text == "once"
    row = {"instruction": "a", "output": "b", "text": "a b"}
    assert convert(row).format.name == "alpaca"
    assert convert(row, prefer_text=True).format.name == "text"


def test_every_format_is_reached_by_its_own_fields():
    for format in FORMATS.values():
        assert detect_format(format.needs, "here") is format


def test_unknown_fields_are_counted_and_unknown_formats_refused():
    found = convert({"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": "b", "id": 2, "x": 0})
    assert found.ignored == {"id": 2, "x": 1}
    with pytest.raises(DataError, match=r"d\.jsonl:1: no known format has the fields body, title.*columns"):
        convert({"title": "a", "body": "b"})
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        named_format("alpacca")
    with pytest.raises(DataError, match="the file holds no rows"):
        convert()


def test_columns_rename_fields():
    found = convert(
        {"title": "a", "body": "b", "prompt": "not read"}, columns={"prompt": "title", "completion": "body"}
    )
    assert found.examples[0].messages == [user("a"), assistant("b")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "a", "output": ["a"]}, "field 'output' must be text, got list"),
        ({"instruction": "a", "output": None}, "field 'output' must be text, got null"),
        ({"instruction": "a", "input": 3, "output": "b"}, "field 'input' must be text, got number"),
        ({"instruction": "a", "history": [["x"]], "output": "b"}, "field 'history' must be a list"),
        ({"messages": "hello"}, "field 'messages' must be a list of messages, got text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]: 'role' must be one of .*; got 'robot'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"messages\[0\]: 'content' must be text, got object"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: 'value' must be text, got null"),
        (
            {"conversations": [{"from": "function_call", "value": "no"}]},
            r"conversations\[0\]: a function call: not valid JSON",
        ),
        ({"messages": [user("a"), assistant("b")], "tools": "{"}, "field 'tools': not valid JSON"),
    ],
)
def test_rows_of_a_wrong_type_are_mistakes(row, words):
    with pytest.raises(DataError, match=r"d\.jsonl:1: " + words):
        convert(row)


def test_a_missing_field_further_down_is_a_mistake():
    with pytest.raises(DataError, match=r"d\.jsonl:2: field 'completion' is missing\. \(2 rows like this: 2, 3\)"):
        convert({"prompt": "a", "completion": "b"}, {"prompt": "a"}, {"prompt": "a"})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([assistant("a")], "the first turn is assistant's"),
        ([user("a"), user("b"), assistant("c")], "roles out of order (user after user)"),
        ([user("a"), assistant("b"), system("c")], "roles out of order (system after assistant)"),
        ([user("a")], "no assistant turn"),
        ([user(" "), assistant("b")], "empty user turn"),
        ([user("a"), assistant("")], "empty assistant turn"),
        ([], "no assistant turn"),
    ],
)
def test_useless_chats_are_left_out_and_counted(turns, reason):
    found = convert({"messages": turns}, {"messages": [user("a"), assistant("b")]})
    assert len(found.examples) == 1
    assert found.unusable.lines == {reason: ["1"]}


def test_empty_answers_and_prompts_are_left_out():
    found = convert({"prompt": "a", "completion": " "}, {"prompt": "", "completion": "b"})
    assert found.unusable.lines == {"empty completion": ["1"], "empty prompt": ["2"]}


def test_tool_calls_come_in_one_shape():
    call = {"name": "add", "arguments": {"a": 1}}
    openai = {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "messages": [
            user("1?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
            },
            {"role": "tool", "content": "1"},
            assistant("1"),
        ],
    }
    sharegpt = {
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
        "conversations": [
            {"from": "human", "value": "1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "1"},
        ],
    }
    one, other = convert(openai).examples[0], convert(sharegpt).examples[0]
    assert one.messages == other.messages
    assert one.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert one.tools == other.tools == [{"type": "function", "function": {"name": "add"}}]
