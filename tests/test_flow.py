"""A flow is checked whole before anything runs: every mistake, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from smidgen.errors import RecipeError
from smidgen.flow import Condition, condition, load_flow

RECIPE = """\
model: some/model
adapter: {method: lora, r: 4}
data: {train: rows.jsonl, eval: rows.jsonl}
"""
FLOW = """\
output: out
stages:
  sft:
    train: recipe.yaml
    set: {train.max_steps: 5}
  second:
    train: recipe.yaml
    from: sft
    set:
      train.learning_rate: 1e-4
      data.eval: rows.jsonl
  score:
    evaluate: second
    limit: 10
  good:
    gate: score
    require: [exact_match >= 0.6, verdict]
  lower:
    gate: second
    require: eval.loss <= 1.5
  merged:
    merge: second
    dtype: float32
  after:
    train: recipe.yaml
    set:
      model: ${merged}
  proven:
    verify: after
"""


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
    Path("rows.jsonl").write_text("{}\n", encoding="utf-8")


def load(text: str):
    Path("flow.yaml").write_text(text, encoding="utf-8")
    return load_flow("flow.yaml")


def test_a_flow_is_read_with_its_recipes():
    flow = load(FLOW)
    assert list(flow.stages) == ["sft", "second", "score", "good", "lower", "merged", "after", "proven"]
    assert flow.recipes["sft"].train.max_steps == 5 and flow.recipes["second"].train.max_steps is None
    assert flow.recipes["second"].train.learning_rate == 1e-4
    assert flow.recipes["second"].output == "out/second"
    assert flow.recipes["after"].model == "out/merged"
    assert flow.uses["after"] == ["merged"] and flow.uses["second"] == ["sft"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("from: sft", "from: stf", "flow.yaml:8: stages.second.from: no stage 'stf'; did you mean 'sft'?"),
        ("merge: second", "merge: nothing", "flow.yaml:22: stages.merged.merge: no stage 'nothing'; there are: sft,"),
        (
            "set: {train.max_steps: 5}",
            "from: second",
            "flow.yaml:5: stages.sft.from: the stages wait for each other: sft -> second -> sft",
        ),
        ("from: sft", "from: second", "flow.yaml:8: stages.second.from: the stages wait for each other: second -> s"),
        ("gate: score", "gate: merged", "flow.yaml:16: stages.good.gate: 'merged' stands below; stages run in the ord"),
        ("limit: 10", "limt: 10", "flow.yaml:14: stages.score: no field 'limt'; did you mean 'limit'?"),
        ("limit: 10", "limit: 0", "flow.yaml:14: stages.score.limit: must be greater than or equal to 1, got 0"),
        ("dtype: float32", "dtype: int8", "flow.yaml:23: stages.merged.dtype: must be 'bfloat16'"),
        ("gate: score", "gates: score", "flow.yaml:15: stages.good: a stage has one of train, evaluate, gate, merge, "),
        ("limit: 10", "merge: sft", "this one has evaluate and merge"),
        ("output: out", "outputs: out", "flow.yaml:1: flow: no field 'outputs'; did you mean 'output'?"),
        ("{train.max_steps: 5}", "{train.max_steps: no}", "flow.yaml:5: stages.sft: train.max_steps: must be "),
        ("{train.max_steps: 5}", "{train.lr_rate: 5}", "flow.yaml:5: stages.sft: train: no field 'lr_rate'"),
        ("{train.max_steps: 5}", "{output: there}", "flow.yaml:5: stages.sft: a stage's folder is the flow's; "),
        ("{train.max_steps: 5}", "{data.train: no.jsonl}", "flow.yaml:4: stages.sft: no.jsonl: no such file"),
        ("{train.max_steps: 5}", "{model: other}", "stages.second.from: its adapter belongs on 'other', and this "),
        ("{train.max_steps: 5}", "{adapter: {method: full}}", "'sft' trains the model itself, so it has no adapter"),
        ("train: recipe.yaml", "train: recip.yaml", "stages.sft: recip.yaml: no such file; did you mean 'recipe.yaml'"),
        (
            "exact_match >=",
            "exact_mach >=",
            "flow.yaml:17: stages.good.require: 'score' measures no 'exact_mach'",
        ),
        ("exact_match >=", "exact_match =", "must be 'verdict', or a metric and its bound, such as 'exact_match >= 0"),
        ("data.eval: rows.jsonl", "data.eval: null", "'second' has no held-out rows; give its 'data.eval' or 'data."),
        ("data.eval: rows.jsonl", "data.eval: null", "'second' names no 'data.eval'; give 'data', a file of held-out"),
        ("merge: second", "merge: score", "flow.yaml:22: stages.merged.merge: 'score' is no train stage, so it holds"),
        ("  good:", "  go/od:", "flow.yaml:15: stages: 'go/od' must be a plain name"),
        ("${merged}", "${mergd}", "flow.yaml:27: stages.after.set.model: no stage 'mergd'; did you mean 'merged'?"),
    ],
)
def test_mistakes_are_told_with_their_line(old: str, new: str, told: str):
    assert old in FLOW
    with pytest.raises(RecipeError) as error:
        load(FLOW.replace(old, new, 1))
    assert told in str(error.value)


def test_all_mistakes_are_told_at_once_with_those_of_the_recipes():
    Path("recipe.yaml").write_text(RECIPE.replace("r: 4", "r: no"), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load(FLOW.replace("from: sft", "from: stf").replace("merge: second", "merges: second"))
    told = str(error.value)
    assert "no stage 'stf'" in told and "recipe.yaml:2: adapter.r: must be" in told and "this one has none" in told


@pytest.mark.parametrize("text", ["output: out\n", "output: out\nstages: []\n", "stages: {}\noutput: 3\n"])
def test_a_flow_without_stages_is_no_flow(text: str):
    with pytest.raises(RecipeError, match="stages: must be a mapping of names to stages"):
        load(text)


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("eval.loss <= 1.5", 1.5, True),
        ("eval.loss<1.5", 1.5, False),
        ("exact_match >= 6e-1", 0.6, True),
        ("gain.low > 0", 0.0, False),
        ("verdict", True, True),
        ("verdict", False, False),
    ],
)
def test_conditions(text: str, value: float, holds: bool):
    wanted = condition(text)
    assert wanted is not None and wanted.holds(value) is holds
    nothing = float("nan")
    assert not wanted.holds(nothing)


@pytest.mark.parametrize("text", ["", "loss", "loss <= ", "<= 1", "loss <= a", "loss == 1", "loss <= 1.2.3"])
def test_what_is_no_condition(text: str):
    assert condition(text) is None
    assert condition("verdict") == Condition("verdict")
