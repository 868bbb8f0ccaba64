from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from smidgen.data.formats import Example
from smidgen.errors import DataError
from smidgen.evaluation import compare as module
from smidgen.evaluation.compare import choose_few_shot, compare, read_examples
from smidgen.recipe import Source
from tests.models.conftest import byte_tokenizer


class Scripted:
    """Stands for an adapted model: what it answers depends on the adapter and on the prompt alone."""

    generation_config = SimpleNamespace(eos_token_id=0)

    def __init__(self) -> None:
        self.tuned, self.prompts = True, []

    @contextmanager
    def disable_adapter(self):
        self.tuned = False
        yield
        self.tuned = True

    def answer(self, prompt: str) -> str:
        number = int(prompt.rpartition("say ")[2].split("<")[0])
        self.prompts.append((self.tuned, prompt))
        if self.tuned:
            return f"say  {number}" if number == 3 else f" {number}\n"  # wrong for row 3 only
        return str(number) if "say 100" in prompt and number in (1, 3) else "?"  # few-shot: right for rows 1 and 3


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch):
    model = Scripted()

    def generate(_, tokenizer, prompts, *, max_new_tokens: int, **__: object):
        assert max_new_tokens >= 9
        return [tokenizer.encode(model.answer(tokenizer.decode(ids))) for ids in prompts]

    monkeypatch.setattr(module, "generate_batch", generate)
    return model


def row(number: int) -> Example:
    turns = [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": str(number)}]
    return Example(number, turns)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_counts_and_summary(model: Scripted, batch_size: int):
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    rows = (row(number) for number in range(5))
    found = compare(model, tokenizer, rows, few_shot=[row(100)], system="Do it.", batch_size=batch_size, samples=2)
    assert (found.rows, found.right) == (5, {"base": 0, "few-shot": 2, "tuned": 4})
    assert (found.gained, found.lost) == (3, 1)
    assert [sample.answers for sample in found.samples] == [
        {"base": "?", "few-shot": "?", "tuned": "0"},
        {"base": "?", "few-shot": "1", "tuned": "1"},
    ]
    assert found.lines()[-1] == "exact match on 5 held-out rows: base 0.0 % (few-shot 40.0 %) -> tuned 80.0 %"
    plain = [prompt for tuned, prompt in model.prompts if tuned]
    assert plain == [prompt for tuned, prompt in model.prompts if not tuned and "say 100" not in prompt]
    assert (
        plain[0] == "<|im_start|>system\nDo it.<|im_end|>\n<|im_start|>user\nsay 0<|im_end|>\n<|im_start|>assistant\n"
    )
    shots = "<|im_start|>user\nsay 100<|im_end|>\n<|im_start|>assistant\n100<|im_end|>\n"
    assert plain[0].replace("<|im_start|>user", shots + "<|im_start|>user") in [prompt for _, prompt in model.prompts]


def test_the_base_is_also_told_in_words(model: Scripted):
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    own = row(1)
    own.messages.insert(0, {"role": "system", "content": "Be kind."})
    found = compare(model, tokenizer, [row(0), own], hard_prompt="say 100", system="Do it.")
    assert found.right == {"base": 0, "hard prompt": 1, "tuned": 2}
    assert found.lines()[-1] == "exact match on 2 held-out rows: base 0.0 % (hard prompt 50.0 %) -> tuned 100.0 %"
    told = [prompt for tuned, prompt in model.prompts if "say 100" in prompt]
    assert [prompt.partition("<|im_end|>")[0] for prompt in told] == [
        "<|im_start|>system\nsay 100\nDo it.",
        "<|im_start|>system\nsay 100\nBe kind.",
    ]


def test_a_row_without_an_answer_and_no_row_are_errors(model: Scripted):
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    with pytest.raises(DataError, match="line 4: there is no assistant's text"):
        compare(model, tokenizer, [Example(4, [{"role": "user", "content": "say 1"}])])
    with pytest.raises(DataError, match="no rows"):
        compare(model, tokenizer, [])


def test_examples_are_read_and_drawn(tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row(n).messages}) + "\n" for n in range(20)), encoding="utf-8")
    source = Source(str(file))
    assert [example.messages[1]["content"] for example in read_examples(source, 3)] == ["0", "1", "2"]
    drawn = choose_few_shot(source, 4, seed=1)
    assert drawn == choose_few_shot(source, 4, seed=1) != choose_few_shot(source, 4, seed=2)
    assert len({example.line for example in drawn}) == 4 and len(choose_few_shot(source, 99, seed=1)) == 20
