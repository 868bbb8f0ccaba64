"""Carries out a flow, stage by stage, by what the commands of the same names call.

``stages.json`` in the flow's folder holds the stages that are done, in their order: what each was made from, the hashes
of what it wrote, what it measured; and the one that was begun. A stage is done once its output is whole. When what a
stage is made from has changed, or what it wrote, it is forgotten with all those after it. Gates are judged each time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smidgen.checking import build
from smidgen.cli.evaluate import evaluate
from smidgen.cli.merge import merge
from smidgen.data.read import data_files
from smidgen.errors import GateFailed, UsageError
from smidgen.evaluation.metrics import paired_gain
from smidgen.evaluation.report import write_report
from smidgen.export.verify import verify
from smidgen.flow import (
    EvaluateStage,
    Flow,
    GateStage,
    MergeStage,
    Stage,
    TrainStage,
    VerifyStage,
    condition,
    kind_of,
    target_of,
)
from smidgen.foreign import read_object
from smidgen.models.lineage import hashes, sha256, weight_files
from smidgen.proofs import RECORD_NAME, lines
from smidgen.recipe import Recipe, Source, flat
from smidgen.training import checkpoint
from smidgen.training.loop import read_log
from smidgen.training.run import FREE_ON_RESUME, train

Say = Callable[[str], None]
Metrics = dict[str, float | bool]

MARKS_NAME = "stages.json"


@dataclass
class Done:
    """A stage that is done: what it was made from, the hashes of what it wrote by file, what it measured."""

    name: str
    inputs: dict[str, str]
    files: dict[str, str]
    metrics: Metrics


@dataclass
class Marks:
    """How far a flow is."""

    done: list[Done] = field(default_factory=list)
    begun: Done | None = None

    def write(self, folder: Path) -> None:
        """Replace the file at once."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{MARKS_NAME}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(partial, folder / MARKS_NAME)

    def of(self, name: str) -> Done | None:
        """The mark of a stage that is done."""
        return next((mark for mark in self.done if mark.name == name), None)


def run_flow(flow: Flow, say: Say = print) -> None:
    """Carry out what is not done yet.

    Raises:
        GateFailed: a gate does not hold, or the proof of a stage failed.
        TrainingStopped: a guard, or the user, stopped a run; what is done stays done.
        UsageError: a folder holds what is not the flow's.
    """
    marks = _read_marks(flow.output)
    number = 0
    for name, stage in flow.stages.items():
        if isinstance(stage, GateStage):
            _judge(flow, name, stage, marks, say)
            continue
        inputs = _inputs(flow, name, stage, marks)
        changed = _changed(flow, marks.done[number], name, inputs) if number < len(marks.done) else None
        if number < len(marks.done) and not changed:
            say(f"stage {name}: done before")
        else:
            if changed:
                again = "; it runs again" + ", and those after it" * (name != list(flow.stages)[-1])
                say(f"stage {name}: {changed}{again}")
            going_on = marks.begun is not None and (marks.begun.name, marks.begun.inputs) == (name, inputs)
            marks.done, marks.begun = marks.done[:number], Done(name, inputs, {}, {})
            marks.write(flow.output)
            say(f"stage {name}: {kind_of(stage)}{' ' + (target_of(stage) or '')}".rstrip())
            metrics = _carry_out(flow, name, stage, going_on, say)
            files = hashes(_outputs(flow, name, stage), flow.output)
            marks.done, marks.begun = [*marks.done, Done(name, inputs, files, metrics)], None
            marks.write(flow.output)
        number += 1
        if isinstance(stage, TrainStage | VerifyStage) and marks.done[number - 1].metrics["verdict"] is False:
            raise GateFailed(f"stage {name}: its proof failed, see above, or {flow.folder(name) / 'proof.json'}")


def _read_marks(folder: Path) -> Marks:
    path = folder / MARKS_NAME
    if not path.is_file():
        if folder.is_dir() and {file.name for file in folder.iterdir()} - {f".{MARKS_NAME}.partial"}:
            raise UsageError(f"{folder}: is not empty, and no flow's folder; give another 'output'")
        return Marks()
    try:
        return build(Marks, read_object(path, UsageError))
    except ValueError as error:
        raise UsageError(f"{path}: damaged; remove it, and the flow begins anew") from error


# ---- what a stage is made from, and whether that changed ----


def _inputs(flow: Flow, name: str, stage: Stage, marks: Marks) -> dict[str, str]:
    """What decides the result of a stage, by name: values of the stage and its recipe, files, stages before it."""
    if isinstance(stage, TrainStage):
        recipe = flow.recipes[name]
        found = {key: json.dumps(value) for key, value in flat(recipe) if not key.startswith(FREE_ON_RESUME)}
        found |= _data([*recipe.data.train, *(recipe.data.eval or [])]) | _model(recipe)
        found |= {"from": stage.source} if stage.source else {}
    else:
        found = {key: json.dumps(value) for key, value in asdict(stage).items()}
    if isinstance(stage, EvaluateStage):
        found |= _data([Source(stage.data)] if stage.data else flow.recipes[stage.evaluate].data.eval or [])
    for other in flow.uses[name]:
        mark = marks.of(other)
        found |= {f"stage {other}": json.dumps(mark.files) if mark else "nothing"}
    return found


def _data(sources: list[Source]) -> dict[str, str]:
    return {f"file {file.as_posix()}": sha256(file) for source in sources for file in data_files(source.path)}


def _model(recipe: Recipe) -> dict[str, str]:
    """The files of a model that lies here: large ones, so that size and time stand for them."""
    place = Path(recipe.model)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors")) if place.is_dir() else []
    states = [(file, file.stat()) for file in files]
    return {f"file {file.as_posix()}": f"{state.st_size} {state.st_mtime_ns}" for file, state in states}


def _changed(flow: Flow, mark: Done, name: str, inputs: dict[str, str]) -> str | None:
    """What is no longer as it was when a stage was done, in a few words."""
    if mark.name != name:
        return f"'{mark.name}' stood in this place"
    keys = [key for key in {**mark.inputs, **inputs} if mark.inputs.get(key) != inputs.get(key)]
    if keys:
        told = [
            key
            if key.startswith(("file ", "stage "))
            else f"{key} {mark.inputs.get(key, 'not set')} -> {inputs.get(key, 'not set')}"
            for key in keys
        ]
        return f"changed: {', '.join(told[:3])}" + f" and {len(told) - 3} more" * (len(told) > 3)
    for file, expected in mark.files.items():
        path = flow.output / file
        if not path.is_file() or sha256(path) != expected:
            return f"its {path.as_posix()} {'changed' if path.is_file() else 'is missing'}"
    return None


def _outputs(flow: Flow, name: str, stage: Stage) -> list[Path]:
    """The files that make up the result of a stage."""
    folder = flow.folder(name)
    places = {TrainStage: [folder / "adapter", folder / "model"], MergeStage: [folder]}.get(type(stage), [])
    records = [folder / RECORD_NAME] if places else []
    return [file for place in places for file in weight_files(place)] + records


# ---- the stages ----


def _carry_out(flow: Flow, name: str, stage: Stage, going_on: bool, say: Say) -> Metrics:
    folder = flow.folder(name)
    if isinstance(stage, TrainStage):
        return _train(flow, name, stage, going_on, say)
    if isinstance(stage, EvaluateStage):
        found = evaluate(flow.folder(stage.evaluate), data=stage.data, limit=stage.limit)
        gain, low, high = paired_gain(found.gained, found.lost, found.rows)
        share = {variant: right / found.rows for variant, right in found.right.items()}
        metrics: Metrics = {"exact_match": share["tuned"], "exact_match.base": share["base"]}
        return metrics | {"gain": gain, "gain.low": low, "gain.high": high, "verdict": low > 0}
    if isinstance(stage, MergeStage):
        if (folder / RECORD_NAME).is_file() and (folder / "config.json").is_file():  # an earlier merge of this flow
            leaving = folder.with_name(f".{name}.partial")  # it is whole, or gone
            shutil.rmtree(leaving, ignore_errors=True)
            os.replace(folder, leaving)
            shutil.rmtree(leaving)
        parity = merge(flow.folder(stage.merge), folder, dtype=stage.dtype, quantize=stage.quantize)
        return {"logit_gap": parity.gap, "same_answers": parity.same / parity.prompts, "verdict": parity.passed}
    assert isinstance(stage, VerifyStage)
    checks = verify(flow.folder(stage.verify), say=say)
    for line in lines(checks):
        say(line)
    return {"verdict": all(check.passed for check in checks)}


def _train(flow: Flow, name: str, stage: TrainStage, going_on: bool, say: Say) -> Metrics:
    folder, recipe = flow.folder(name), flow.recipes[name]
    source = flow.folder(stage.source) if stage.source else None
    resume = going_on and checkpoint.latest(folder / "checkpoints") is not None
    proof = train(recipe, resume=resume, overwrite=not resume, init_adapter=source, say=say)
    say(f"report: {write_report(folder)}")
    metrics: Metrics = {"verdict": proof.passed}
    for line in read_log(folder):  # the last value of each
        for key, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics[f"eval.{key[5:]}" if key.startswith("eval_") else f"train.{key}"] = value
    return metrics


def _judge(flow: Flow, name: str, stage: GateStage, marks: Marks, say: Say) -> None:
    """Tell each condition of a gate with the value that was measured.

    Raises:
        GateFailed: a condition does not hold, or what it is about was not measured.
    """
    mark = marks.of(stage.gate)
    measured = mark.metrics if mark else {}
    for text in stage.require:
        wanted = condition(text)
        assert wanted is not None
        value = measured.get(wanted.metric)
        if value is None:
            raise GateFailed(f"gate {name}: '{stage.gate}' measured no {wanted.metric}, only {', '.join(measured)}")
        told = str(value).lower() if isinstance(value, bool) else f"{value:.6g}"
        line = f"gate {name}: {wanted.metric} of {stage.gate} must be {wanted}, and is {told}"
        if not wanted.holds(value):
            raise GateFailed(line)
        say(line)
