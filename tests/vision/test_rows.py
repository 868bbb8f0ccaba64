"""Rows with images: their tokens against the model's own processor, their files, what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from smidgen.data.packing import micro_batches
from smidgen.data.templates import ChatTemplate
from smidgen.errors import DataError, UsageError
from smidgen.models.images import image_inputs, reader_of
from tests.training.conftest import save_tiny_model
from tests.vision.conftest import DIGITS, chat, load, prepared, write_images, write_rows


def test_rows_are_what_the_processor_makes_of_the_chat(base, tmp_path):
    """Ids and pixels of one image, of two, of none, and of a wide one that some models see in tiles."""
    model, tokenizer = load(base)
    names = write_images(tmp_path)
    chosen = [names[:1], names[1:2], names[:2], []]
    rows = prepared(model, tokenizer, write_rows(tmp_path, [chat(images, "7 8") for images in chosen])).train
    processor = AutoProcessor.from_pretrained(base)
    for row, images in zip(rows, chosen, strict=True):
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "which digit is this ?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "7 8"}]}
        text = processor.apply_chat_template([{"role": "user", "content": parts}, answer])
        opened = [Image.open(tmp_path / name) for name in images]
        expected = processor(text=[text], images=opened or None, add_special_tokens=False, return_tensors="pt")
        assert row.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert tokenizer.decode(row.input_ids[row.supervised]) == "7 8 </s>"
        assert row.images == tuple(str(tmp_path / name) for name in images)
        if images:
            made = image_inputs(model, row.images)
            assert made.keys() == expected.keys() - {"input_ids", "attention_mask"}
            assert all(torch.equal(made[name], expected[name]) for name in made)


def test_the_images_column_says_the_same_as_parts(llava, tmp_path):
    model, tokenizer = load(llava)
    one, two, *_ = write_images(tmp_path)
    asked = {"role": "user", "content": "<image><image>which digit"}
    named = {"messages": [asked, {"role": "assistant", "content": "3"}], "images": [one, {"path": two}]}
    unnamed = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which digit"}]
    parts = {"messages": [{"role": "user", "content": unnamed}, named["messages"][1]], "images": [one, two]}
    pairs = {"prompt": "<image><image>which digit", "completion": "3", "images": [one, two]}
    single = {"conversations": [{"from": "human", "value": "<image>is"}, {"from": "gpt", "value": "3"}], "images": one}
    rows = [chat([one, two], "3", "which digit"), named, parts]
    found = prepared(model, tokenizer, write_rows(tmp_path, rows)).train
    pair = prepared(model, tokenizer, write_rows(tmp_path, [pairs])).train
    for row in [*found, *pair]:
        assert row.input_ids.tolist() == found[0].input_ids.tolist() and row.images == found[0].images
    assert len(prepared(model, tokenizer, write_rows(tmp_path, [single])).train[0].images) == 1


def test_image_tokens_are_never_learned(llava, tmp_path):
    """Neither where everything is learned, nor in an answer that shows an image."""
    model, tokenizer = load(llava)
    names = write_images(tmp_path)
    row = chat(names[:1], "3")
    row["messages"][1]["content"] = [{"type": "image", "path": names[1]}, {"type": "text", "text": "3"}]
    rows = prepared(model, tokenizer, write_rows(tmp_path, [row]), train_on="all").train
    ids, learned = rows[0].input_ids, rows[0].supervised
    assert (ids == 4).sum() == 32 and not learned[ids == 4].any() and learned[ids != 4].all()


WRONG = {
    "missing": (chat(["none.png"], "3"), "rows.jsonl:2: image 'none.png': no such file"),
    "broken": (chat(["broken.png"], "3"), "rows.jsonl:2: image .*broken.png: no image that can be read"),
    "cut": (chat(["cut.png"], "3"), "rows.jsonl:2: image .*cut.png: "),
    "outside": (chat(["../0.png"], "3"), "rows.jsonl:2: image '../0.png': leads out of the data file's folder"),
    "more": (
        {**chat([], "3", "<image>"), "images": ["0.png", "1.png"]},
        "2: 2 images, but 1 times <image> in the text",
    ),
    "fewer": (chat(["0.png"], "3", "<image>"), "2: 1 images, but 2 times <image> in the text"),
    "none": (chat([], "3", "<image>"), "2: 0 images, but 1 times <image> in the text"),
    "both": ({**chat(["0.png"], "3"), "images": ["0.png"]}, "keep one of them"),
    "unnamed": (chat([None], "3"), "an image must be named by the path of its file"),  # type: ignore[list-item]
    "type": ({**chat([], "3"), "images": 3}, "field 'images' must be a list of paths, got number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_named(llava, tmp_path, name):
    model, tokenizer = load(llava)
    folder = tmp_path / "data"
    folder.mkdir()
    names = write_images(folder)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "cut.png").write_bytes((folder / names[0]).read_bytes()[:200])
    (tmp_path / names[0]).write_bytes((folder / names[0]).read_bytes())
    row, expected = WRONG[name]
    with pytest.raises(DataError, match=expected):
        prepared(model, tokenizer, write_rows(folder, [chat(names[:1], "3"), row]))


def test_all_wrong_rows_are_told_at_once(llava, tmp_path):
    model, tokenizer = load(llava)
    rows = write_rows(tmp_path, [chat(["a.png"], "3"), chat(["b.png"], "3")])
    with pytest.raises(DataError, match=r"(?s)rows.jsonl:1: image 'a.png'.*rows.jsonl:2: image 'b.png'"):
        prepared(model, tokenizer, rows)


def test_a_model_without_images_refuses_them(tmp_path):
    model, tokenizer = load(save_tiny_model(tmp_path / "base"))
    names = write_images(tmp_path)
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has images, and the model takes none, .* \(2 rows"):
        prepared(model, tokenizer, write_rows(tmp_path, [chat(names[:1], "one"), chat(names[:1], "two")]))
    with pytest.raises(UsageError, match="LlamaForCausalLM: takes no images"):
        image_inputs(model, names)


def test_a_mark_is_a_word_where_the_model_takes_no_images(tmp_path):
    model, tokenizer = load(save_tiny_model(tmp_path / "base"))
    rows = prepared(model, tokenizer, write_rows(tmp_path, [chat([], "one", "the <image> of the sun")])).train
    assert rows[0].images == ()


@pytest.mark.parametrize("on_long", ["truncate_prompt", "truncate", "drop", "error"])
def test_long_rows_with_images_are_never_cut(llava, tmp_path, on_long):
    model, tokenizer = load(llava)
    names = write_images(tmp_path)
    path = write_rows(tmp_path, [chat(names[:1], "3"), chat(names[:2], "3")])
    if on_long == "error":
        with pytest.raises(DataError, match=r"rows.jsonl:2: the row is longer than max_length=30"):
            prepared(model, tokenizer, path, max_length=30, on_long=on_long)
        return
    ready = prepared(model, tokenizer, path, max_length=30, on_long=on_long)
    assert len(ready.train) == 1 and (ready.train[0].input_ids == 4).sum() == 16
    assert any("longer than max_length=30" in line for line in ready.report.lines())


def test_images_are_read_when_a_batch_is_computed_and_no_sooner(llava, tmp_path):
    model, tokenizer = load(llava)
    names = write_images(tmp_path)
    rows = prepared(model, tokenizer, write_rows(tmp_path, [chat([name], "3") for name in names])).train
    batches = micro_batches(rows, range(4), token_budget=60, packing=False, pad_id=0)
    assert [len(batch.images) for batch in batches] == [2, 2]
    assert sorted(path for batch in batches for path in batch.images) == sorted(str(tmp_path / n) for n in names)
    (tmp_path / names[0]).unlink()
    with pytest.raises(DataError, match=r"image .*0\.png"):
        for batch in batches:
            image_inputs(model, batch.images)


def test_rows_with_other_images_are_other_rows(llava, tmp_path):
    """Same text, other image: no duplicate; and nothing of it is kept in the cache, where a file could grow stale."""
    model, tokenizer = load(llava)
    names = write_images(tmp_path)
    path = write_rows(tmp_path, [chat([names[0]], "3"), chat([names[2]], "3"), chat([names[0]], "3")])
    ready = prepared(model, tokenizer, path)
    assert ready.report.duplicates == 1 and len(np.unique(ready.train.digest)) == 2
    assert ready.train.select(np.array([1]))[0].images == (str(tmp_path / names[2]),)


STRINGS = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
BOTH = (
    "{% for m in messages %}{{ m.role + ' ' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ '[<image>]' if p.type == 'image' else p.text }}{% endfor %}{% endif %}"
    "{{ ' ' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "user <image>is assistant 3 "),
        (BOTH, "user [<image>]is assistant 3 "),
        (DIGITS.TEMPLATE, "user <image> is assistant 3</s>"),
    ],
)
def test_templates_of_texts_and_of_parts(template, expected):
    _, tokenizer = DIGITS.tiny_language()
    written = ChatTemplate(tokenizer, template, "template")
    turns = [{"role": "user", "content": "<image>is", "images": 1}, {"role": "assistant", "content": "3"}]
    assert written._render(turns) == expected
    turns[0].pop("images")
    if template == BOTH:  # of a row without images, the mark is a word like others
        assert written._render(turns) == "user <image>is assistant 3 "


def test_the_reader_belongs_to_the_model(llava, tmp_path):
    assert reader_of(load(llava)[0]) is not None
    assert reader_of(load(save_tiny_model(tmp_path / "base"))[0]) is None
