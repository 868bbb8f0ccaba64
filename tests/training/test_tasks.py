"""Tasks with labels, from rows to the saved adapter with its head, and to scores."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import smidgen
from smidgen.adapters.files import read_adapter, save_adapter
from smidgen.cli.main import app
from smidgen.data.task_rows import TaskBatch
from smidgen.data.tasks import read_files
from smidgen.errors import AdapterFileError, DataError, ModelError, UsageError
from smidgen.evaluation.tasks import score, told
from smidgen.export.merge import merge_to_folder
from smidgen.models.load import load_model
from smidgen.models.open import find, open_model
from smidgen.models.tasks import labels_of, new_heads, task_logits
from smidgen.recipe import Source, load_recipe
from smidgen.training import proof as proof_module
from smidgen.training import run
from smidgen.training.objectives import Collating
from smidgen.training.setup import make_trainable, prepare
from tests.training.labelled import BODIES, rows_of, save_body, write_task_recipe

TASKS = tuple(BODIES)
CPU = torch.device("cpu")


@pytest.fixture
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the checks in a fresh process, which take seconds."""
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])


def silent(line: str) -> None: ...


def setup_of(task: str, folder: Path, **fields: Any) -> Any:
    recipe, _ = load_recipe(write_task_recipe(task, folder, **fields))
    torch.manual_seed(0)
    setup = prepare(recipe, None, silent, CPU)
    make_trainable(setup, silent)
    setup.model.train()
    return setup


@pytest.mark.parametrize("task", TASKS)
def test_gradients_do_not_depend_on_how_an_update_is_cut(task: str, tmp_path: Path) -> None:
    setup = setup_of(task, tmp_path)
    rows, found = setup.data.train, []
    for budget in (int(rows.lengths.max()), 10_000):
        batches = setup.objective.collate(rows, range(len(rows)), Collating(budget, False, 0))
        count = sum(setup.objective.count(batch) for batch in batches)
        setup.model.zero_grad()
        for batch in batches:
            values, of_rows, _ = setup.objective.loss(setup.model, batch)
            assert len(values) == len(of_rows) == setup.objective.count(batch)
            (values.sum() / count).backward()
        found.append(
            (len(batches), {n: p.grad.clone() for n, p in setup.model.named_parameters() if p.grad is not None})
        )
    (many, one), (few, other) = found
    assert many > few and one.keys() == other.keys() and any("classifier" in n or "lora" in n for n in one)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_one_of_transformers(task: str, tmp_path: Path) -> None:
    setup = setup_of(task, tmp_path)
    setup.model.eval()
    for index in (0, 7):
        (batch,) = setup.objective.collate(setup.data.train, [index], Collating(64, False, 0))
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.second is not None:
            inputs["token_type_ids"] = batch.second
        if task == "question_ans":
            inputs |= dict(zip(("start_positions", "end_positions"), batch.labels.T, strict=True))
        else:
            inputs["labels"] = batch.labels[:, 0] if task == "seq_cls" else batch.labels
        expected = setup.model(**inputs).loss
        torch.testing.assert_close(setup.objective.loss(setup.model, batch)[0].mean(), expected, atol=1e-6, rtol=1e-5)


def scores(adapted: Any, rows: list[list[int]]) -> list[list[float]]:
    with torch.no_grad():
        return [adapted(torch.tensor([ids])).logits[0].tolist() for ids in rows]


def test_a_head_is_trained_saved_and_found_again(tmp_path: Path, no_fresh_process: None) -> None:
    path = write_task_recipe("seq_cls", tmp_path)
    lines: list[str] = []
    proof = run.train(load_recipe(path, ["train.max_steps=5"])[0], say=lines.append)
    assert proof.passed and any(line.startswith("new: classifier, pooler") or "new: " in line for line in lines)
    adapter = tmp_path / "run" / "adapter"
    tensors, metadata = read_adapter(adapter)
    assert metadata["labels"] == ["blue", "green", "red"]
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} <= tensors.keys()
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    torch.manual_seed(99)  # the base's own new head is another one each time
    adapted, _ = open_model(find(tmp_path / "run"), say=silent)
    torch.manual_seed(7)
    again = smidgen.AutoPeftModelForSequenceClassification.from_pretrained(adapter, dtype=torch.float32)
    rows = [[1, 6, 7, 2], [1, 9, 2], [1, 12, 13, 14, 2], [1, 15, 2]]
    torch.testing.assert_close(
        torch.tensor(scores(adapted, rows)), torch.tensor(scores(again, rows)), atol=1e-6, rtol=0
    )
    assert labels_of(again) == labels_of(adapted) == ["blue", "green", "red"]


def test_an_adapter_without_its_head_is_refused(tmp_path: Path, no_fresh_process: None) -> None:
    path = write_task_recipe("seq_cls", tmp_path)
    run.train(load_recipe(path, ["train.max_steps=2"])[0], say=silent)
    adapter = tmp_path / "run" / "adapter"
    tensors, metadata = read_adapter(adapter)
    config = smidgen.PeftConfig.from_pretrained(adapter)
    bare = {key: tensor for key, tensor in tensors.items() if "classifier" not in key}
    save_adapter(adapter, bare, config, metadata)
    with pytest.raises(AdapterFileError, match=r"2 missing.*\n.*classifier"):
        open_model(find(tmp_path / "run"), say=silent)
    config.modules_to_save = config.task_type = None  # a file that does not even say that there was a head
    save_adapter(adapter, bare, config, metadata)
    with pytest.raises(AdapterFileError, match="no weights of 'classifier', and neither does the base"):
        open_model(find(tmp_path / "run"), say=silent)
    with pytest.raises(AdapterFileError, match="no weights of 'classifier'"):
        smidgen.AutoPeftModelForSequenceClassification.from_pretrained(adapter)


FRESH = """
import json, sys, torch
from smidgen.models.open import find, open_model
adapted, _ = open_model(find(sys.argv[1]), "float32", say=lambda _: None)
with torch.no_grad():
    print(json.dumps([adapted(torch.tensor([ids])).logits[0].tolist() for ids in json.loads(sys.argv[2])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 1])
def test_scores_are_equal_in_a_new_process(classes: int, tmp_path: Path) -> None:
    """A scalar head, as reward models have it, is a classifier of one class."""
    base = save_body("seq_cls", tmp_path / "base")
    labels = ["reward"] if classes == 1 else ["a", "b", "c"]
    model, tokenizer = load_model(base, "float32", task="seq_cls", labels=labels, say=silent)
    assert new_heads(model) == ["classifier"] and model.config.num_labels == classes
    config = smidgen.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=new_heads(model))
    config.base_model_name_or_path = str(base)
    adapted = smidgen.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    rows = [[1, 4 + index, 9, 4 + index // 2, 2] for index in range(8)]
    for _ in range(5):
        optimizer.zero_grad()
        (adapted(torch.tensor(rows)).logits - torch.arange(8.0)[:, None]).square().mean().backward()
        optimizer.step()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    process = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "adapter"), json.dumps(rows)], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    torch.testing.assert_close(
        torch.tensor(json.loads(process.stdout)), torch.tensor(scores(adapted, rows)), atol=1e-6, rtol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "freeze"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_learned_proven_and_scored(task: str, method: str, tmp_path: Path) -> None:
    adapter: dict[str, Any] = {"method": method}
    if method == "lora":
        adapter |= {"r": 4, "target_modules": "all-linear"}
    if method == "freeze":
        adapter["num_layers"] = 1 if task != "seq_2_seq_lm" else 2
    recipe, _ = load_recipe(write_task_recipe(task, tmp_path, adapter=adapter))
    lines: list[str] = []
    proof = run.train(recipe, say=lines.append)
    assert proof.passed, "\n".join(proof.lines())
    assert all(sample.reference for sample in proof.samples)
    place = find(tmp_path / "run")
    model, tokenizer = open_model(place, say=silent)
    files = read_files(recipe.data.eval or [], task)
    found = score(model, tokenizer, files, task)
    if task == "seq_2_seq_lm":
        assert all("loss" in line for line in found)
    else:
        assert float(found[-1].split(": ")[1].split("%")[0]) > 75, found
    if method == "lora":
        with torch.no_grad():
            parity = merge_to_folder(model, tokenizer, tmp_path / "merged", torch.float32, say=silent)
        assert parity.passed
        merged, _ = load_model(tmp_path / "merged", "float32", say=silent)
        assert not new_heads(merged) and score(merged, tokenizer, files, task)[-1] == found[-1]


def test_labels_are_read_from_the_data_and_an_unknown_one_is_an_error(tmp_path: Path) -> None:
    setup = setup_of("seq_cls", tmp_path)
    assert setup.model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    other = tmp_path / "other.jsonl"
    other.write_text(
        '{"text": "one", "label": "red"}\n{"text": "two", "label": "pink"}\n{"text": "a", "label": "pink"}\n'
    )
    files = read_files([Source(str(other))], "seq_cls")
    with pytest.raises(DataError, match=r"other.jsonl:2: unknown label 'pink'; 3 labels are known.*2 rows like this"):
        score(setup.model, setup.tokenizer, files, "seq_cls")
    with pytest.raises(DataError, match="unknown label 'pink'"):
        setup_of("seq_cls", tmp_path, data={"train": str(tmp_path / "rows.jsonl"), "eval": str(other)})


def test_rows_without_a_label_are_counted_in_one_error(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "label": "a"},
        {"text": "two"},
        {"text": "three", "label": ""},
        {"text": "sky", "label": None},
    ]
    with pytest.raises(
        DataError, match=r"rows.jsonl:2: no label: field 'label' is missing or empty. \(3 rows like this: 2, 3"
    ):
        setup_of("seq_cls", tmp_path, rows=rows)
    with pytest.raises(DataError, match="1 different labels"):
        setup_of("seq_cls", tmp_path, rows=rows[:1] * 4)


def test_a_base_whose_body_lacks_weights_is_refused(tmp_path: Path) -> None:
    base = save_body("seq_cls", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="weights are missing"):
        load_model(base, "float32", task="seq_cls", labels=["a", "b"], say=silent)


def test_a_classifier_that_knows_the_labels_keeps_its_head(tmp_path: Path) -> None:
    setup = setup_of("seq_cls", tmp_path)
    trained = tmp_path / "trained"
    model = setup.model.merge_and_unload()
    model.config.update({"id2label": {0: "red", 1: "green", 2: "blue"}, "label2id": {"red": 0, "green": 1, "blue": 2}})
    model.save_pretrained(trained)
    setup.tokenizer.save_pretrained(trained)
    (tmp_path / "second").mkdir()
    again = setup_of("seq_cls", tmp_path / "second", model=str(trained))
    assert not new_heads(again.model) and labels_of(again.model) == ["red", "green", "blue"]
    first: Any = load_model(trained, "float32", say=silent)[0]
    assert torch.equal(first.classifier.weight, again.model.classifier.weight)


def test_the_command_line_classifies_and_scores(tmp_path: Path, no_fresh_process: None) -> None:
    path = write_task_recipe("seq_cls", tmp_path)
    run.train(load_recipe(path)[0], say=silent)
    runner, folder = CliRunner(), str(tmp_path / "run")
    found = runner.invoke(app, ["evaluate", folder])
    assert found.exit_code == 0, found.output
    assert "accuracy on 15 rows: 100.0% (95 % interval 79.6% to 100.0%)" in found.output
    assert "always 'blue', the most frequent label here: 33.3% right" in found.output
    answers = runner.invoke(app, ["generate", folder, "the sky", "one two sun"])
    assert answers.exit_code == 0, answers.output
    lines = [line.split("\t") for line in answers.stdout.splitlines() if "\t" in line]
    assert [label for label, _ in lines] == ["blue", "red"] and all(0.3 < float(chance) <= 1 for _, chance in lines)
    assert runner.invoke(app, ["evaluate", folder, "--data", str(tmp_path / "none.jsonl")]).exit_code != 0


def test_padding_is_no_answer(tmp_path: Path) -> None:
    setup = setup_of("question_ans", tmp_path)
    rows = setup.data.train
    long, short = int(rows.lengths.argmax()), int(rows.lengths.argmin())
    (batch, *_) = setup.objective.collate(rows, [long, short], Collating(1000, False, 0))
    assert isinstance(batch, TaskBatch)
    if batch.attention_mask is not None:
        logits = task_logits(setup.model, batch, "question_ans")
        assert torch.isneginf(logits[:, 0][batch.attention_mask == 0]).all()


def test_every_task_reads_its_own_rows(tmp_path: Path) -> None:
    assert {task: len(rows_of(task)) for task in TASKS} == dict.fromkeys(TASKS, 15)
    with pytest.raises(DataError, match="tokens/tags: tokens, tags"):
        setup_of("token_cls", tmp_path, rows=rows_of("seq_cls"))


def test_told_needs_texts(tmp_path: Path) -> None:
    setup = setup_of("token_cls", tmp_path)
    with pytest.raises(UsageError, match="evaluate RUN"):
        list(told(setup.model, setup.tokenizer, ["one"], "token_cls"))
