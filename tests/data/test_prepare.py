import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from smidgen.data import encode_prompt, prepare_data
from smidgen.data.check import CLOSE, OPEN, marked
from smidgen.errors import DataError
from smidgen.recipe import DataRecipe, Source


@pytest.fixture
def llama(tokenizers):
    return tokenizers["llama3"]


def prepare(tokenizer, *paths, stop_ids=None, **options):
    call = {name: options.pop(name) for name in ("objective", "cache_dir", "seed", "progress") if name in options}
    sources = [path if isinstance(path, Source) else Source(path) for path in paths]
    stop_ids = {tokenizer.eos_token_id} if stop_ids is None else stop_ids
    return prepare_data(DataRecipe(train=sources, **options), tokenizer, stop_ids=stop_ids, **call)


def pairs(count, answer="yes it is"):
    return [{"prompt": f"question {number}?", "completion": answer} for number in range(count)]


def test_rows_keep_their_places_and_the_exact_template_is_offered(llama, write):
    path = write(pairs(3))
    ready = prepare(llama, path)
    assert [row.where for row in ready.train] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert ready.template == llama.chat_template
    row = ready.train[1]
    assert row.input_ids[: row.prompt_length].tolist() == encode_prompt(
        [{"role": "user", "content": "question 1?"}], llama, template=ready.template
    )
    assert ready.train.supervised_counts.tolist() == [row.supervised.sum() for row in ready.train]
    assert ready.report.train.prompts == (3, 3)


def test_a_template_that_never_stops_is_refused(llama, write):
    path = write(pairs(100))
    with pytest.raises(
        DataError, match=r"data: 0 of 64 sampled rows end in a stop token \(eos=<\|eot\|>; stop tokens: <bos>"
    ):
        prepare(llama, path, stop_ids={llama.bos_token_id})
    template = write("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "t.jinja")
    with pytest.raises(DataError, match=r"0 of 64 sampled rows .* will not learn to stop\. Fix:"):
        prepare(llama, path, template=template)


def test_no_supervised_tokens_is_an_error_with_its_reasons(llama, write):
    path = write(
        [{"messages": [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "b"}]}] * 8
        + [{"messages": [{"role": "user", "content": "a"}]}] * 2
    )
    words = (
        r"data: 0 supervised tokens in 10 rows \(reason: response beyond max_length=32 in 8, no assistant turn in 2\)"
    )
    with pytest.raises(DataError, match=words):
        prepare(llama, path, max_length=32, on_long="truncate")


def test_cut_rows_are_told_in_one_line(llama, write):
    row = {"prompt": "q", "completion": "a"}
    lost = {"prompt": "word " * 100, "completion": "a"}
    cut = {"prompt": "q", "completion": "word " * 100}
    ready = prepare(llama, write([row] * 93 + [lost] * 2 + [cut] * 5), max_length=64, on_long="truncate")
    line = next(line for line in ready.report.lines() if "exceed" in line)
    assert line.strip().startswith(
        "7/100 rows exceed 64 tokens: 5 lose their ending (EOS), 2 lose all supervised tokens -> dropped"
    )
    assert len(ready.train) == 98
    with pytest.raises(DataError, match=r":94: the row is longer than max_length=64\. \(7 rows like this: 94, 95"):
        prepare(llama, write([row] * 93 + [lost] * 2 + [cut] * 5), max_length=64, on_long="error")


def test_a_bad_row_is_told_with_file_and_line_for_all_files_at_once(llama, write):
    one = write([{"prompt": "a", "completion": 1}], "one.jsonl")
    other = write([{"prompt": "a", "completion": "b"}, 3], "other.jsonl")
    with pytest.raises(DataError) as error:
        prepare(llama, one, other)
    assert str(error.value).splitlines() == [
        f"{one}:1: field 'completion' must be text, got number.",
        f"{other}:2: a row must be an object, got number.",
    ]
    assert error.value.exit_code == 2


def test_a_second_run_reads_the_cache_and_any_change_misses_it(llama, tokenizers, write, tmp_path, monkeypatch):
    cache, path = tmp_path / "cache", write(pairs(5))

    def run(tokenizer=llama, **options):
        ready = prepare(tokenizer, path, cache_dir=cache, **options)
        return ready, ready.report.train.cached

    first, cached = run()
    assert not cached
    again, cached = run()
    assert cached
    for one, other in zip(first.train, again.train, strict=True):
        assert one.where == other.where
        assert (one.input_ids == other.input_ids).all() and (one.supervised == other.supervised).all()
    assert [line.replace("; tokens from the cache", "") for line in again.report.lines()] == first.report.lines()
    template = write(llama.chat_template + "{# changed #}", "t.jinja")
    for change in ({"template": template}, {"max_length": 99}, {"system": "S"}, {"train_on": "all"}, {"limit": 4}):
        assert not run(**change)[1], change
        assert run(**change)[1], change
    assert not run(tokenizers["gemma"])[1]
    Path(path).write_text(Path(path).read_text() + json.dumps(pairs(1)[0]) + "\n")
    longer, cached = run()
    assert not cached and len(longer.train) == 6
    assert not list(cache.glob("*.part"))

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(max_length=77)
    monkeypatch.undo()
    assert not run(max_length=77)[1]


def test_a_template_style_chosen_by_us_is_remembered_by_the_cache(tokenizers, write, tmp_path):
    plain = tokenizers["plain"]
    path = write([{"instruction": "a", "output": "b"}])
    ready = [prepare(plain, path, cache_dir=tmp_path / "cache") for _ in range(2)]
    assert ready[0].template == ready[1].template is not None
    assert "### Instruction:" in plain.decode(ready[1].train[0].input_ids)
    texts = prepare(plain, write([{"text": "once upon"}], "t.jsonl"))
    assert texts.template is None


def test_the_report_names_what_is_odd(llama, write):
    rows = [{**row, "id": 1} for row in pairs(40)]
    path = write([*rows, *rows[:3], {"prompt": "a", "completion": ""}])
    other = write(rows[:2], "eval.jsonl")
    report = prepare(llama, path, eval=[Source(other)]).report
    text = "\n".join(report.lines())
    assert "prompt/completion, 44 rows; ignored fields: id (43 rows)" in text
    assert "1 rows left out: empty completion (lines 44)" in text
    assert "duplicates: 3 training rows" in text and "overlap: 2 evaluation rows" in text
    assert sum(count for _, _, count in report.histogram) == 43
    assert len(report.samples) == 3
    assert f"question 0?<|eot|><|head|>assistant<|/head|>\n\n{OPEN}yes it is<|eot|>{CLOSE}" in report.samples[0]


def test_marks_stand_around_the_learned_text_only(tokenizers, write):
    for family in ("llama3", "gemma", "qwen3", "llama2"):
        tokenizer = tokenizers[family]
        row = prepare(tokenizer, write(pairs(1))).train[0]
        text = marked(row, tokenizer)
        assert text.replace(OPEN, "").replace(CLOSE, "") == tokenizer.decode(row.input_ids)
        inside = text.split(OPEN)[1].split(CLOSE)[0]
        assert inside.strip() == f"yes it is{tokenizer.eos_token}"


def test_held_out_rows_are_not_trained_on(llama, write):
    path = write([{"prompt": f"q{number}", "completion": "a"} for number in range(50)])
    for size, count in ((0.1, 5), (7, 7)):
        ready = prepare(llama, path, eval_size=size, seed=3)
        assert (len(ready.train), len(ready.eval)) == (50 - count, count)
        assert not {row.where for row in ready.train} & {row.where for row in ready.eval}
        again = prepare(llama, path, eval_size=size, seed=3)
        assert [row.where for row in again.eval] == [row.where for row in ready.eval]
    with pytest.raises(DataError, match="leaves none"):
        prepare(llama, path, eval_size=50)


def test_mixtures_are_shares_of_tokens_and_are_told(llama, write):
    one, other = write(pairs(300), "one.jsonl"), write(pairs(20, "word " * 30), "other.jsonl")
    ready = prepare(llama, Source(one, weight=1), Source(other, weight=3))
    rows = [row.where.startswith(other) for row in ready.train]
    share = ready.train.lengths[np.array(rows)].sum() / ready.train.lengths.sum()
    assert abs(share - 0.75) < 0.02
    assert f"{other}: " in ready.report.mixture[1] and "rows out of 20" in ready.report.mixture[1]
    with pytest.raises(DataError, match=r"either every source has a weight or none has; without: .*other"):
        prepare(llama, Source(one, weight=1), Source(other))


def test_pretraining_learns_everything_and_folders_are_read_whole(tokenizers, tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text("hello there, how are you today?\n")
    (tmp_path / "texts" / "c.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    ready = prepare(tokenizers["llama3"], str(tmp_path / "texts"), objective="pretrain")
    assert len(ready.train) == 3
    assert all(row.supervised.all() for row in ready.train)
    assert (ready.train.supervised_counts == ready.train.lengths - 1).all()


def test_progress_ends_with_all_rows(llama, write):
    told = []
    prepare(llama, write(pairs(10)), progress=told.append)
    assert told[-1].startswith("tokenising ") and "10/10 rows" in told[-1] and "tokens/s" in told[-1]


def test_importing_loads_no_torch():
    code = "import sys, smidgen.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


@pytest.mark.skipif("SMIDGEN_TEST_DATA" not in os.environ, reason="SMIDGEN_TEST_DATA is not set")
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("llamafactory_demo/alpaca_en_demo.json", "alpaca"),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", "sharegpt"),
        ("gsm8k/test.jsonl", "question/answer"),
        ("tldr_pages/nl_to_command.jsonl", "instruction/command"),
    ],
)
def test_real_files_are_read_as_they_are(name, format):
    from transformers import AutoTokenizer

    root = Path(os.environ["SMIDGEN_TEST_DATA"])
    tokenizer = AutoTokenizer.from_pretrained(root / "models" / "stories260k")
    ready = prepare(tokenizer, str(root / "data" / name), limit=300)
    (file,) = ready.report.train.files
    assert (file.format, file.rows) == (format, 300)
    assert len(ready.train) + sum(count for count, _ in file.left.values()) == 300
    same, sampled = ready.report.train.prompts
    assert same == sampled > 0
    bos = tokenizer.bos_token_id
    assert all(row.input_ids[0] == bos and (row.input_ids == bos).sum() == 1 for row in ready.train)
