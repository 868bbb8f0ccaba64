import json
import time

import pyarrow
import pyarrow.parquet
import pytest

from smidgen.data.formats import convert_rows
from smidgen.data.read import LONGEST_LINE, data_files, read_rows
from smidgen.errors import DataError


def rows_of(path):
    (file,) = data_files(path)
    return list(read_rows(file))


def told(path):
    with pytest.raises(DataError) as error:
        convert_rows("train.jsonl", read_rows(data_files(path)[0]), format=None)
    return str(error.value)


ALPACA = {"instruction": "Say hi", "input": "", "output": "hi"}


def test_every_kind_of_file_gives_the_same_rows_with_their_places(write, tmp_path):
    rows = [{"prompt": "a", "completion": 'b "quoted"\nsecond line'}, {"prompt": "c é", "completion": "d"}]
    kinds = {
        "rows.jsonl": "".join(json.dumps(row) + "\n\n" for row in rows),
        "rows.json": json.dumps(rows, indent=1),
        "lines.json": "".join(json.dumps(row) + "\n" for row in rows),
        "rows.csv": '\ufeffprompt,completion\na,"b ""quoted""\nsecond line"\nc é,d\n',
        "rows.tsv": 'prompt\tcompletion\na\t"b ""quoted""\nsecond line"\nc é\td\n',
    }
    places = {"rows.jsonl": [1, 3], "rows.json": [2, 6], "lines.json": [1, 2], "rows.csv": [2, 4], "rows.tsv": [2, 4]}
    for name, text in kinds.items():
        found = rows_of(write(text, name))
        assert [row for _, row in found] == rows, name
        assert [line for line, _ in found] == places[name], name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert rows_of(str(tmp_path / "rows.parquet")) == [(1, rows[0]), (2, rows[1])]


def test_a_text_file_is_one_document_and_a_long_one_is_cut_at_empty_lines(write, monkeypatch):
    assert rows_of(write("one\n\ntwo\n", "a.txt")) == [(1, {"text": "one\n\ntwo\n"})]
    monkeypatch.setattr("smidgen.data.read.TEXT_PIECE", 12)
    text = "aaaa\n\nbbbb\nbbbb\n\ncccc\ndddddddddd\nee\n"
    pieces = rows_of(write(text, "b.txt"))
    assert "".join(row["text"] for _, row in pieces) == text
    assert [line for line, _ in pieces] == [1, 3, 6, 8]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "bad JSON"),
        (b'{"a": 1} {"b": 2}', "more than one JSON value on the line (column 9)"),
        (b'{"instruction": "caf\xe9"}', "not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (b'{"a": "\x00"}', "holds a NUL character"),
        (b"[1, 2]", "a row must be an object, got list"),
        (b"[" * 100_000, "bad JSON: nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "bad JSON"),
    ],
)
def test_a_bad_line_is_named(write, line, words):
    good = json.dumps(ALPACA).encode()
    message = told(write(b"\n".join([good, line, good, line])))
    assert message.startswith(f"train.jsonl:2: {words}")
    assert message.endswith("(2 rows like this: 2, 4)")


def test_a_line_of_many_megabytes_is_refused_in_bounded_memory(write):
    good = json.dumps(ALPACA).encode() + b"\n"
    path = write(good + b'{"text": "' + b"x" * (3 * LONGEST_LINE) + b'"}\n' + good)
    assert told(path) == "train.jsonl:2: line is longer than 8 MiB."


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "x".encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        ("a.json", b'"text"', "a JSON file must hold a list of rows"),
        ("a.json", b'[{"a": 1},\n{"b": 2} {"c": 3}]', "a.json:2: bad JSON: expected ',' or ']'"),
        ("a.json", b'[{"a": 1},\n{"b": }]', "a.json:2: bad JSON"),
        ("a.json", b'[{"a": 1},', "bad JSON"),
        ("a.json", b'[{"a": "\xff"}]', "not UTF-8"),
        ("a.parquet", b"nothing", "not a readable Parquet file"),
        ("a.csv", b"text,text\na,b\n", "columns named twice: text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(write, name, content, words):
    with pytest.raises(DataError, match=r"a\.\w+") as error:
        rows_of(write(content, name))
    assert words in str(error.value)


def test_csv_rows_of_a_wrong_width_and_open_quotes(write):
    message = told(write("prompt,completion\na,b\nc\nd,e\nf,g,h\n", "a.csv"))
    assert "train.jsonl:3: 1 cells, but the header names 2 columns." in message
    assert "train.jsonl:5: 3 cells, but the header names 2 columns." in message
    assert "bad CSV" in told(write('prompt,completion\na,b\nc,"d\n', "b.csv"))


def test_files_that_are_not_there(tmp_path, write):
    write("x", "train.txt")
    with pytest.raises(DataError, match=r"no such file; did you mean 'train\.txt'\?"):
        data_files(str(tmp_path / "trian.txt"))
    with pytest.raises(DataError, match=r"unknown kind of file '\.bin'"):
        data_files(write("x", "a.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file in this folder"):
        data_files(str(tmp_path / "empty"))
    assert [file.name for file in data_files(str(tmp_path))] == ["train.txt"]


def test_all_bad_rows_of_a_large_file_are_told_quickly(write):
    """100 MB are to take about a second; a fifth of it is read here, with room for a busy machine."""
    line = json.dumps({"instruction": "word " * 40, "input": "", "output": "text " * 40}) + "\n"
    bad = json.dumps({"instruction": "word", "output": ["a"]}) + "\n"
    count = 20_000_000 // len(line)
    lines = [line] * count
    for number in (812, 901, 1440):
        lines[number - 1] = bad
    path = write("".join(lines))
    start = time.process_time()
    message = told(path)
    assert time.process_time() - start < 1.5
    assert message == "train.jsonl:812: field 'output' must be text, got list. (3 rows like this: 812, 901, 1440)"
