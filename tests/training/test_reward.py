"""Reward models, from pairs to the saved head."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from smidgen.adapters.files import read_adapter, save_adapter
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.cli.main import app
from smidgen.data import packing
from smidgen.data.packing import batch_of
from smidgen.data.preference_rows import PairRows
from smidgen.data.task_rows import prepare_task, task_batch
from smidgen.data.tasks import STEP_LABELS, TaskFiles, read_files
from smidgen.errors import AdapterFileError, DataError, ModelError, RecipeError, UsageError
from smidgen.models.open import find, open_model
from smidgen.models.peft_model import get_peft_model
from smidgen.models.rewards import answer_scores, check_head, kind_of_reward, score_rows, token_scores
from smidgen.recipe import DataRecipe, Source, load_recipe
from smidgen.training import proof as proof_module
from smidgen.training import run
from smidgen.training.objectives import Collating
from smidgen.training.reward import ProcessReward, Reward
from tests.conftest import TINY, perturb, tiny_bert
from tests.training.conftest import make_pairs, make_rows, save_tiny_model
from tests.training.test_loop import gradients
from tests.training.test_preference_runs import GOOD, carry_out, write_preferences
from tests.training.test_processes import LAUNCHERS, command

PAIRS = make_pairs(
    [(7, 12), (9, 6), (16, 10), (5, 8), (11, 11), (6, 14), (13, 7), (8, 9), (10, 15), (4, 6)],
    [3, 4, 5, 2, 6, 3, 4, 5, 6, 2],
)
PAIRS = PairRows(PAIRS.rows, np.arange(10) / 4)


def tiny_reward(adapted: bool = True, **options: Any) -> Any:
    """A tiny Llama with a scalar head, and LoRA on all linear layers with the head trained beside it."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    fields: dict[str, Any] = TINY | {"num_labels": 1} | options
    model: Any = LlamaForSequenceClassification(LlamaConfig(**fields)).eval()
    if not adapted:
        return model
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", modules_to_save=["score"]))


def moved() -> Any:
    model = tiny_reward()
    perturb(model, scale=0.3)
    return model.double()


def make() -> Reward:
    return Reward(centering=0.05)


def test_gradients_do_not_depend_on_the_cut_into_micro_batches(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "_ALIKE", 0.0)  # rows of unequal lengths may share a batch
    for update in (list(range(8)), [8, 9, 0]):
        numbers = set()
        whole = gradients(tmp_path / "w", moved(), 4096, False, update, PAIRS, make())
        assert any("score" in name and grad.abs().max() > 1e-4 for name, grad in whole.items())
        for budget in (32, 64, 128):
            numbers.add(len(make().collate(PAIRS, update, Collating(budget, False, 0))))
            cut = gradients(tmp_path / "c", moved(), budget, False, update, PAIRS, make())
            for key, grad in whole.items():
                torch.testing.assert_close(cut[key], grad, atol=1e-6, rtol=1e-6, msg=f"{budget} {key}")
        assert len(numbers) == 3


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_the_loss_and_its_gradient_are_trls(centering: float, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "_ALIKE", 0.0)
    trl = pytest.importorskip("trl")
    from trl.trainer.reward_trainer import DataCollatorForPreference

    model, objective = tiny_reward(), Reward(centering)
    perturb(model, scale=0.3)
    (batch,) = objective.collate(PAIRS, range(10), Collating(4096, False, 0))
    ours = objective.loss(model, batch).values.mean()
    mine = torch.autograd.grad(ours, [p for p in model.parameters() if p.requires_grad])
    examples = [
        {
            "chosen_ids": pair.chosen.input_ids.tolist(),
            "rejected_ids": pair.rejected.input_ids.tolist(),
            "margin": pair.margin,
        }
        for pair in PAIRS
    ]
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=centering or None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        _metrics={"eval": defaultdict(list), "train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    theirs = trl.RewardTrainer.compute_loss(trainer, model, DataCollatorForPreference(pad_token_id=0)(examples))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for one, other in zip(
        mine, torch.autograd.grad(theirs, [p for p in model.parameters() if p.requires_grad]), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_scores_are_read_at_the_last_token_whatever_stands_beside() -> None:
    model, rows = moved(), [PAIRS.rows[index] for index in range(9)]
    alone = [model(torch.from_numpy(row.input_ids)[None].long()).logits.item() for row in rows]
    for budget in (1, 40, 4096):
        assert score_rows(model, rows, 0, budget) == pytest.approx(alone, abs=1e-6)
    # A stop token that pads too: the model's own answer would be another token's.
    model.config.pad_token_id = int(rows[0].input_ids[-1])
    assert score_rows(model, rows[:1], 0) == pytest.approx(alone[:1], abs=1e-6)
    assert model(torch.from_numpy(rows[0].input_ids)[None].long()).logits.item() != pytest.approx(alone[0], abs=1e-3)


def test_a_token_is_judged_with_those_before_it() -> None:
    model, (row, *_) = moved(), [PAIRS.rows[4]]
    scores = token_scores(model, batch_of([row], [0], packing=False, pad_id=0))[0]
    for end in (3, 7, 11):
        part = make_rows([1])[0].__class__(row.input_ids[:end], row.supervised[:end], "")
        (last,) = answer_scores(model, batch_of([part], [0], packing=False, pad_id=0)).tolist()
        assert last == pytest.approx(scores[end - 1].item(), abs=1e-6)


@pytest.mark.parametrize("adapted", [True, False])
def test_the_head_computes_in_float32_whatever_the_base_is_in(adapted: bool) -> None:
    model = tiny_reward(adapted)
    if adapted:
        perturb(model, scale=0.3)
    base = {p for name, p in model.named_parameters() if ".adapters." not in name}
    for parameter in base:
        parameter.data = parameter.data.bfloat16()
    rows, seen = [PAIRS.rows[index] for index in range(4)], []
    weight = model.score.adapters["default"].weight if adapted else model.score.weight
    for row in rows:
        body = model.model(torch.from_numpy(row.input_ids)[None].long()).last_hidden_state
        seen.append((body[0, -1].float() @ weight[0].float()).item())
    assert score_rows(model, rows, 0, 1) == pytest.approx(seen, abs=1e-6)
    assert any(score != torch.tensor(score).bfloat16().item() for score in seen)
    weight.requires_grad_(True)
    answer_scores(model, batch_of(rows, range(4), packing=False, pad_id=0)).sum().backward()
    assert weight.grad is not None and weight.grad.abs().max() > 0 and not model.score._forward_hooks


def test_a_head_that_does_not_read_every_token_is_refused() -> None:
    check_head(tiny_reward())
    with pytest.raises(ModelError, match="no scalar head 'score' over its tokens; reward models stand on decoders"):
        check_head(tiny_bert())


@pytest.fixture
def no_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the checks in a fresh process, which take seconds."""
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(proof_module, "verify_afresh", lambda _: [])


def test_a_recipe_learns_a_reward(tmp_path: Path, no_fresh_process: None) -> None:
    path = write_preferences(tmp_path, "reward", reward={"center_rewards_coefficient": 0.01})
    proof, lines = carry_out(path, f"data.eval={tmp_path / 'preferences.jsonl'}", "train.epochs=6")
    assert proof.passed, proof.lines()
    text = "\n".join(lines)
    assert "new: score, made at random; trained and saved with the rest" in text
    assert "length: the better answer is the longer one" in text
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert told[-1]["rewards/accuracies"] == 1 and told[-1]["loss"] < told[0]["loss"]
    assert told[-1]["eval_rewards/accuracies.low"] <= told[-1]["eval_rewards/accuracies"]
    assert "(95 % interval" in proof.checks[0].text
    tensors, metadata = read_adapter(tmp_path / "run" / "adapter")
    assert metadata["labels"] == ["reward"] and any("score" in key for key in tensors)
    assert json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    model, _ = open_model(find(tmp_path / "run"), say=lambda _: None)
    assert kind_of_reward(model) == "reward"


FRESH = """
import json, sys
import smidgen
scorer = smidgen.load_scorer(sys.argv[1], say=lambda _: None)
print(json.dumps(scorer.score([tuple(pair) for pair in json.loads(sys.argv[2])])))
"""
ANSWERS = ("red", "blue", "two", "three")
EIGHT = [(f"what is the colour of the {thing}", answer) for thing in ("sky", "sun") for answer in ANSWERS]


def test_an_adapter_without_its_head_is_refused(tmp_path: Path, no_fresh_process: None) -> None:
    carry_out(write_preferences(tmp_path, "reward"), "train.max_steps=1")
    adapter = tmp_path / "run" / "adapter"
    tensors, metadata = read_adapter(adapter)
    config = LoraConfig.from_pretrained(adapter)
    bare = {key: tensor for key, tensor in tensors.items() if "score" not in key}
    save_adapter(adapter, bare, config, metadata)
    with pytest.raises(AdapterFileError, match=r"1 missing.*\n.*score"):
        open_model(find(tmp_path / "run"), say=lambda _: None)
    config.modules_to_save = config.task_type = None  # a file that does not even say that there was a head
    save_adapter(adapter, bare, config, metadata)
    with pytest.raises(AdapterFileError, match="no weights of 'score', and neither does the base"):
        open_model(find(tmp_path / "run"), say=lambda _: None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "ia3", "prompt_tuning"])
def test_a_saved_head_gives_the_same_scores_in_a_new_process(method: str, tmp_path: Path) -> None:
    import smidgen

    adapter = {"lora": {"r": 4}, "prompt_tuning": {"num_virtual_tokens": 3}}.get(method, {})
    path = write_preferences(tmp_path, "reward")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) | {"adapter": {"method": method} | adapter}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    proof = run.train(load_recipe(path, ["train.max_steps=5"])[0], say=lambda _: None)
    assert {check.name: check.passed for check in proof.checks}["reload"], proof.lines()
    here = smidgen.load_scorer(tmp_path / "run", say=lambda _: None).score(EIGHT)
    arguments = [sys.executable, "-c", FRESH, str(tmp_path / "run"), json.dumps(EIGHT)]
    process = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert len(set(here)) == 8 and json.loads(process.stdout) == pytest.approx(here, abs=1e-6)


def test_rows_that_say_nothing_are_told(tmp_path: Path, no_fresh_process: None) -> None:
    empty, long = GOOD | {"rejected": "  "}, {"prompt": "what is the " * 30, "chosen": "blue", "rejected": "red"}
    path = write_preferences(tmp_path, "reward", [GOOD, empty, long, GOOD | {"chosen": "two"}])
    _, lines = carry_out(path, "train.max_steps=1")
    text = "\n".join(lines)
    assert "1 rows left out: empty rejected (lines 2)" in text
    assert "rows exceed 32 tokens: 1 lose the beginning of their prompt" in text, text
    lacking = write_preferences(tmp_path, "reward", [GOOD, {"prompt": "what", "chosen": "two"}])
    with pytest.raises(DataError, match=r"preferences.jsonl:2: field 'rejected' is missing"):
        carry_out(lacking, overwrite=True)


def test_settings_without_effect_are_told(tmp_path: Path) -> None:
    path = write_preferences(tmp_path, "reward", preference={"beta": 0.2}, data={"packing": True})
    with pytest.raises(
        RecipeError, match=r"(?s)packing.*one below the other.*beta: has no effect with 'objective: rew"
    ):
        load_recipe(path)
    path = write_preferences(tmp_path, "dpo", reward={"center_rewards_coefficient": 0.1})
    with pytest.raises(RecipeError, match="center_rewards_coefficient: has no effect with 'objective: dpo'"):
        load_recipe(path)


# ---- steps ----

SOLUTIONS = [
    {"prompt": f"what is the {thing}", "completions": ["the sky is", colour, "one two"], "labels": [True, right, right]}
    for thing in ("sky", "sun", "sea")
    for colour, right in (("blue", True), ("three", False))
]


def write_solutions(folder: Path, rows: list | None = None, **data: Any) -> Path:
    path = write_preferences(folder, "process_reward", rows or SOLUTIONS * 3)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["data"].update(data)
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_steps_are_scored_where_they_end(tmp_path: Path, no_fresh_process: None) -> None:
    import smidgen

    path = write_solutions(tmp_path, eval=str(tmp_path / "preferences.jsonl"))
    proof, lines = carry_out(path, "train.epochs=8")
    assert proof.passed, proof.lines()
    assert "⟦right wrong wrong⟧" in "\n".join(lines)
    scorer = smidgen.load_scorer(tmp_path / "run", say=lambda _: None)
    assert scorer.kind == "process_reward"
    good, bad = scorer.score([(row["prompt"], row["completions"]) for row in SOLUTIONS[:2]])
    assert len(good) == len(bad) == 3 and min(good) > 0 > max(bad[1:]) and good[0] == pytest.approx(bad[0], abs=1e-6)
    found = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run")])
    assert "accuracy on 54 steps of 18 solutions: 100.0% (95 % interval 93.4% to 100.0%)" in found.output, found.output
    assert "always the same verdict is right in 66.7%" in found.output
    with pytest.raises(DataError, match="row:1: the answer must be a list of texts, the steps"):
        scorer.score([("what is the sky", "blue")])


def test_the_gradient_of_steps_does_not_depend_on_the_cut(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "_ALIKE", 0.0)
    rows = [SOLUTIONS[0], {**SOLUTIONS[1], "completions": ["the", "three", "red " * 9]}, *SOLUTIONS[2:]]
    files = read_files([Source(str(write_rows(tmp_path, rows)))], "process_reward")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "base"))
    data = DataRecipe(train=[Source("rows.jsonl")], max_length=64)
    train = prepare_task(TaskFiles(files, None, ()), data, "process_reward", tokenizer, STEP_LABELS).train
    for update in ([0, 1, 2, 3], [4, 5, 1]):
        found = [
            gradients(tmp_path / "c", moved(), budget, False, update, train, ProcessReward())
            for budget in (4096, 48, 28)
        ]
        for cut in found[1:]:
            for key, grad in found[0].items():
                torch.testing.assert_close(cut[key], grad, atol=1e-6, rtol=1e-6)
    batch = task_batch([train[0], train[1]], [0, 1], 0)
    losses = ProcessReward().loss(moved(), batch)
    assert len(losses.values) == 6 and losses.rows.tolist() == [0, 0, 0, 1, 1, 1]
    row = train[1]
    ends = np.flatnonzero(row.labels >= 0)
    assert row.labels[ends].tolist() == [1, 0, 0] and ends[-1] == len(row.input_ids) - 1
    alone = [moved()(torch.from_numpy(row.input_ids[: end + 1])[None].long()).logits.item() for end in ends]
    signs = torch.tensor([1.0, -1.0, -1.0])
    expected = torch.nn.functional.softplus(-signs * torch.tensor(alone))
    torch.testing.assert_close(losses.values[3:].detach().float(), expected, atol=1e-5, rtol=1e-5)


def test_solutions_that_cannot_be_learned_are_told(tmp_path: Path) -> None:
    def read(rows: list, **options: Any) -> Any:
        files = read_files([Source(str(write_rows(tmp_path, rows)))], "process_reward")
        data = DataRecipe(train=[Source("rows.jsonl")], max_length=16, **options)
        tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "base"))
        return prepare_task(TaskFiles(files, None, ()), data, "process_reward", tokenizer, STEP_LABELS)

    good = SOLUTIONS[0]
    long, endless = good | {"completions": ["the", "one " * 20, "two"]}, good | {"prompt": "what is " * 20}
    found = read(
        [good, good | {"completions": ["a", " ", "b"]}, good | {"completions": [], "labels": []}, long, endless]
    )
    text = "\n".join(found.report.lines())
    assert "1 rows left out: empty step (lines 2)" in text and "1 rows left out: no steps (lines 3)" in text
    assert "1 rows left out: the prompt leaves no room for a step in max_length=16 (lines 5)" in text
    assert len(found.train) == 2 and (found.train[1].labels >= 0).sum() == 1
    with pytest.raises(DataError, match=r"rows.jsonl:4: longer than max_length=16"):
        read([good, good, good, long], on_long="error")
    for row, told in (
        (good | {"labels": [True]}, "3 steps, but 1 labels; each step needs one"),
        (good | {"labels": ["yes"] * 3}, "field 'labels' must be a list of true and false"),
        (good | {"completions": "the sky"}, "field 'completions' must be a list, got"),
        (good | {"completions": [1, 2, 3]}, "field 'completions' must be a list of texts, the steps"),
        (good | {"prompt": 3}, "field 'prompt' must be text or messages"),
    ):
        with pytest.raises(DataError, match=told):
            read([good, row])


# ---- the scorer ----


def test_the_scorer_takes_chats_and_pairs_and_files(tmp_path: Path, no_fresh_process: None) -> None:
    import smidgen

    carry_out(write_preferences(tmp_path, "reward"), "train.epochs=6")
    run_folder = str(tmp_path / "run")
    scorer = smidgen.load_scorer(run_folder, say=lambda _: None)
    chat = [{"role": "user", "content": EIGHT[0][0]}, {"role": "assistant", "content": EIGHT[0][1]}]
    scores = scorer.score([*EIGHT, chat])
    assert all(isinstance(score, float) for score in scores) and scores[0] == pytest.approx(scores[8], abs=1e-6)
    assert scorer.score([([{"role": "user", "content": EIGHT[5][0]}], EIGHT[5][1])]) == pytest.approx([scores[5]])
    with pytest.raises(DataError, match=r"(?s)row:1: must be a prompt with an answer, or a list.*row:2: empty answer"):
        scorer.score(["text", ("what", " "), EIGHT[0]])
    runner, out = CliRunner(), tmp_path / "scores.jsonl"
    pairs = tmp_path / "preferences.jsonl"
    with pairs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(GOOD | {"rejected": " "}) + "\n")
    found = runner.invoke(app, ["score", run_folder, str(pairs), "--output", str(out)])
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 24 and all(line["chosen"] > line["rejected"] for line in lines) and lines[0]["line"] == 1
    (first,) = scorer.score([(GOOD["prompt"], GOOD["chosen"])])
    assert lines[0]["chosen"] == pytest.approx(first, abs=1e-6)
    for told in ("1 rows left out: empty rejected", "to take the longer answer is right in 75.0%", "(10 bins)"):
        assert told in found.stderr, found.stderr
    assert "accuracy on 24 pairs: 100.0% (95 % interval 86.2% to 100.0%)" in found.stderr
    evaluated = runner.invoke(app, ["evaluate", run_folder, "--data", str(pairs)])
    assert "accuracy on 24 pairs: 100.0%" in evaluated.output and evaluated.exit_code == 0
    answers = write_rows(tmp_path, [{"prompt": prompt, "completion": answer} for prompt, answer in EIGHT])
    found = runner.invoke(app, ["score", run_folder, str(answers)])
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["score"] for line in lines] == pytest.approx(scores[:8], abs=1e-6)
    assert "scored: 8 rows" in found.stderr
    said = runner.invoke(app, ["generate", run_folder, "what"])
    assert "a reward model scores answers, and gives none: smidgen score RUN FILE" in str(said.exception)
    with pytest.raises(UsageError, match="no reward model; 'objective: reward' trains one"):
        smidgen.load_scorer(tmp_path / "base", say=lambda _: None)


def write_rows(folder: Path, rows: list) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_merged_reward_model_scores_alike(tmp_path: Path, no_fresh_process: None) -> None:
    import smidgen

    carry_out(write_preferences(tmp_path, "reward"))
    before = smidgen.load_scorer(tmp_path / "run", say=lambda _: None).score(EIGHT)
    found = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), str(tmp_path / "merged"), "--dtype", "float32"])
    assert found.exit_code == 0, found.output
    scorer = smidgen.load_scorer(tmp_path / "merged", dtype="float32", say=lambda _: None)
    assert scorer.kind == "reward" and scorer.score(EIGHT) == pytest.approx(before, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["reward", "process_reward"])
def test_two_processes_train_what_one_trains(objective: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    if objective == "reward":
        rows = [GOOD | {"chosen": "blue " * (1 + at % 5), "rejected": "red " * (1 + at % 3)} for at in range(13)]
        path = write_preferences(tmp_path, "reward", rows)
    else:
        path = write_solutions(tmp_path, [SOLUTIONS[0], *SOLUTIONS * 2])
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["train"] |= {"learning_rate": 1e-5, "epochs": 3, "batch_size": 4}  # the last update has a single row
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    for number in (1, 2):
        done = command(*LAUNCHERS["processes"][:-1], str(number), str(path), f"output={tmp_path / str(number)}")
        assert (tmp_path / str(number) / "adapter").is_dir(), done.stdout + done.stderr
    one, two = (load_file(tmp_path / number / "adapter" / "adapter_model.safetensors") for number in "12")
    assert one.keys() == two.keys() and any("score" in key for key in one)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=0)
