"""The flow: one YAML file that says which stages follow one another, from training to a merged model.

`load_flow` reads it, reports every mistake in it and in the recipes of its stages at once, and answers plain
dataclasses. Stages run in the order in which they are written, and a stage names only those above it. As in recipes,
relative paths are relative to the working directory. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field

from smidgen.checking import check
from smidgen.drafts import Draft, Place, dotted, read_draft
from smidgen.errors import RecipeError, did_you_mean
from smidgen.recipe import Recipe, Source, load_recipe

Name: TypeAlias = Annotated[str, Field(min_length=1)]

_FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_CONDITION = re.compile(r"\s*([\w./-]+)\s*(<=|>=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
_BASE_METHODS = ("full", "freeze")  # these train the base, so that there is no adapter


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """A run. `train`: its recipe; `set`: values that replace the recipe's; `from`: whose adapter is trained further."""

    train: Name
    set: dict[str, Any] = field(default_factory=dict)
    source: Annotated[Name | None, Field(alias="from")] = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    """Exact match of base and tuned, as `smidgen evaluate`. `evaluate`: the run's stage."""

    evaluate: Name
    data: Name | None = None
    limit: Annotated[int, Field(ge=1)] | None = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class GateStage:
    """Conditions on what a stage measured; where one does not hold, the flow stops. `gate`: that stage."""

    gate: Name
    require: Annotated[list[str], Field(min_length=1)]

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class MergeStage:
    """A plain model, as `smidgen merge`. `merge`: the run's stage."""

    merge: Name
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    quantize: Literal["nf4", "fp4", "int8"] | None = None

    __pydantic_config__ = _FORBID


@dataclass(frozen=True, kw_only=True)
class VerifyStage:
    """The proof of a run made again, as `smidgen verify`. `verify`: the run's stage."""

    verify: Name

    __pydantic_config__ = _FORBID


Stage: TypeAlias = TrainStage | EvaluateStage | GateStage | MergeStage | VerifyStage

KINDS: dict[str, type] = {
    "train": TrainStage,
    "evaluate": EvaluateStage,
    "gate": GateStage,
    "merge": MergeStage,
    "verify": VerifyStage,
}
# What a stage measures; a run: the numbers of its log too.
METRICS: dict[str, tuple[str, ...]] = {
    "train": ("verdict",),
    "evaluate": ("exact_match", "exact_match.base", "gain", "gain.low", "gain.high", "verdict"),
    "merge": ("logit_gap", "same_answers", "verdict"),
    "verify": ("verdict",),
}


@dataclass(frozen=True)
class Flow:
    """A checked flow.

    recipes: of the train stages, with the flow's values and output put in.
    uses: the stages that each stage takes something from, its gate's apart.
    """

    output: Path
    stages: dict[str, Stage]
    recipes: dict[str, Recipe]
    uses: dict[str, list[str]]

    def folder(self, stage: str) -> Path:
        """Where a stage writes to."""
        return self.output / stage


@dataclass(frozen=True)
class Condition:
    """``exact_match >= 0.6``; a metric alone must be true."""

    metric: str
    relation: str | None = None
    bound: float = 0.0

    def holds(self, value: float | bool) -> bool:
        """Whether a measured value is within the bound."""
        if self.relation is None:
            return value is True
        return {"<=": value <= self.bound, ">=": value >= self.bound, "<": value < self.bound, ">": value > self.bound}[
            self.relation
        ]

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:g}" if self.relation else "true"


def condition(text: str) -> Condition | None:
    """Read a condition; None where it is none."""
    if match := _CONDITION.fullmatch(text):
        try:
            return Condition(match[1], match[2], float(match[3]))
        except ValueError:
            return None
    return Condition("verdict") if text.strip() == "verdict" else None


def kind_of(stage: Stage) -> str:
    """``train``, ``evaluate``, ``gate``, ``merge`` or ``verify``."""
    return next(kind for kind, known in KINDS.items() if isinstance(stage, known))


def target_of(stage: Stage) -> str | None:
    """The stage whose result this one starts from, if it starts from one."""
    return stage.source if isinstance(stage, TrainStage) else getattr(stage, kind_of(stage))


def load_flow(path: str | Path) -> Flow:
    """Read a flow.

    Raises:
        smidgen.errors.RecipeError: with a line for every mistake, in the file and in the recipes that it names.
    """
    draft = read_draft(Path(path))
    stages, output = draft.data.get("stages"), draft.data.get("output")
    for key in [key for key in draft.data if key not in ("output", "stages")]:
        draft.problem((key,), f"flow: no field '{key}'{_near(key, ('output', 'stages'))}")
    if not isinstance(output, str) or not output:
        draft.problem(("output",), "output: must name the folder of the flow")
        output = "flow"
    if not isinstance(stages, dict) or not stages:
        draft.problem(("stages",), "stages: must be a mapping of names to stages")
        draft.raise_problems()
    flow = Flow(Path(str(output)), {}, {}, {})
    assert isinstance(stages, dict)
    references = {name: list(_references(data)) for name, data in stages.items()}
    for name, data in stages.items():
        here: Place = ("stages", name)
        if not _PLAIN_NAME.fullmatch(name):
            draft.problem(here, f"stages: '{name}' must be a plain name, of letters, digits, '-' and '_'")
        for place, other in references[name]:
            _check_reference(draft, (*here, *place), name, other, references)
        if (stage := _stage(draft, here, data, flow)) is not None:
            flow.stages[name] = stage
            flow.uses[name] = list(dict.fromkeys(other for _, other in references[name]))
            if isinstance(stage, TrainStage):
                _read_recipe(draft, here, name, stage, flow)
            _check_target(draft, here, stage, flow)
    draft.raise_problems()
    return flow


def _stage(draft: Draft, here: Place, data: Any, flow: Flow) -> Stage | None:
    kinds = [key for key in data if key in KINDS] if isinstance(data, dict) else []
    if len(kinds) != 1:
        keys = list(data) if isinstance(data, dict) else []
        near = next((told for key in keys if key not in kinds and (told := did_you_mean(str(key), KINDS))), "")
        found = f"has {' and '.join(kinds)}" if kinds else f"has none{near}"
        draft.problem(here, f"{dotted(here)}: a stage has one of {', '.join(KINDS)}; this one {found}")
        return None
    if isinstance(data.get("require"), str):
        data["require"] = [data["require"]]
    known = ["from" if known.name == "source" else known.name for known in fields(KINDS[kinds[0]])]
    return check(
        draft,
        KINDS[kinds[0]],
        _filled(data, flow),
        here,
        lambda _, name: f"no field '{name}'{_near(name, known)}",
    )


# ---- what stages take from others ----


def _references(data: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """The stages that a stage names, with the place of each."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            plain = not place and key in ("from", "evaluate", "gate", "merge", "verify")
            yield from [((key,), value)] if plain and isinstance(value, str) else _references(value, (*place, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _references(value, (*place, index))
    elif isinstance(data, str):
        yield from ((place, name) for name in _REFERENCE.findall(data))


def _check_reference(
    draft: Draft, place: Place, name: str, other: str, references: dict[str, list[tuple[Place, str]]]
) -> None:
    order = list(references)
    if other not in references:
        message = f"no stage '{other}'{_near(other, order)}"
    elif circle := _circle(name, other, references):
        message = f"the stages wait for each other: {' -> '.join(circle)}"
    elif order.index(other) > order.index(name):
        message = f"'{other}' stands below; stages run in the order in which they are written: move it up"
    else:
        return
    draft.problem(place, f"{dotted(place)}: {message}")


def _circle(name: str, other: str, references: dict[str, list[tuple[Place, str]]]) -> list[str]:
    """The way from `name` by `other` back to `name`, if there is one."""
    ways, seen = [[name, other]], {other}
    while ways:
        way = ways.pop()
        if way[-1] == name:
            return way
        for _, following in references.get(way[-1], []):
            if following not in seen:
                seen.add(following)
                ways.append([*way, following])
    return []


def _filled(value: Any, flow: Flow) -> Any:
    """A value with the folder of a stage in the place of each ``${stage}``."""
    if isinstance(value, dict):
        return {key: _filled(item, flow) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, flow) for item in value]
    if isinstance(value, str):
        return _REFERENCE.sub(lambda match: flow.folder(match[1]).as_posix(), value)
    return value


def _check_target(draft: Draft, here: Place, stage: Stage, flow: Flow) -> None:
    """What a stage starts from must be of a kind that it can use; a gate's metrics must be there."""
    name, kind = target_of(stage), kind_of(stage)
    target = flow.stages.get(name) if name else None
    if name is None or target is None:  # unknown stages were told
        return
    place = (*here, "from" if kind == "train" else kind)
    recipe = flow.recipes.get(name)
    if isinstance(stage, GateStage):
        for index, text in enumerate(stage.require):
            if message := _wrong_condition(text, name, target, recipe):
                draft.problem((*here, "require", index), f"{dotted((*here, 'require'))}: {message}")
    elif not isinstance(target, TrainStage):
        draft.problem(place, f"{dotted(place)}: '{name}' is no train stage, so it holds no run")
    elif recipe and kind != "verify" and recipe.adapter["method"] in _BASE_METHODS:
        remedy = f"; write 'model: ${{{name}}}/model' in 'set'" if kind == "train" else ""
        draft.problem(place, f"{dotted(place)}: '{name}' trains the model itself, so it has no adapter{remedy}")
    elif recipe and kind == "evaluate" and not (recipe.data.eval or getattr(stage, "data", None)):
        draft.problem(place, f"{dotted(place)}: '{name}' names no 'data.eval'; give 'data', a file of held-out rows")


def _wrong_condition(text: str, name: str, target: Stage, recipe: Recipe | None) -> str | None:
    wanted = condition(text)
    if wanted is None:
        return f"must be 'verdict', or a metric and its bound, such as 'exact_match >= 0.6', got '{text}'"
    known, of_log = METRICS.get(kind_of(target), ()), isinstance(target, TrainStage)
    if of_log and wanted.metric.startswith("eval.") and recipe and not (recipe.data.eval or recipe.data.eval_size):
        return f"'{name}' has no held-out rows; give its 'data.eval' or 'data.eval_size'"
    if wanted.metric in known or (of_log and wanted.metric.startswith(("eval.", "train."))):
        return None
    there = [*known, *(("eval.loss", "train.loss") if of_log else ())]
    return f"'{name}' measures no '{wanted.metric}'{_near(wanted.metric, there)}"


def _near(word: str, known: Collection[str]) -> str:
    """What to say after a word that is not known: its nearest spelling, else all that are known."""
    return did_you_mean(word, known) or f"; there are: {', '.join(known) or 'none'}"


# ---- the recipes of train stages ----


def _read_recipe(draft: Draft, here: Place, name: str, stage: TrainStage, flow: Flow) -> None:
    """Check the recipe of a stage with all that the flow sets; note its mistakes in the flow's draft."""
    overrides = {f"{key}={json.dumps(value)}": (*here, "set", key) for key, value in stage.set.items()}
    if "output" in stage.set:
        draft.problem((*here, "set", "output"), f"{dotted(here)}: a stage's folder is the flow's; remove 'output'")
    try:
        recipe, _ = load_recipe(stage.train, [*overrides, f"output={json.dumps(flow.folder(name).as_posix())}"])
    except RecipeError as error:
        for line in str(error).splitlines():
            place = next((place for text, place in overrides.items() if line.startswith(f"override '{text}'")), None)
            told = line.partition("': ")[2] if place else line
            draft.problem(place or (*here, "train"), f"{dotted(here)}: {told}")
        return
    before = flow.recipes.get(stage.source or "")
    if before and before.model != recipe.model:
        told = f"its adapter belongs on '{before.model}', and this recipe's model is '{recipe.model}'"
        draft.problem((*here, "from"), f"{dotted((*here, 'from'))}: {told}")
    for source in _sources(recipe):
        if not os.path.exists(source.path) and not _made(source.path, flow):
            draft.problem((*here, "train"), f"{dotted(here)}: {source.path}: no such file")
    flow.recipes[name] = replace(recipe, output=flow.folder(name).as_posix())


def _sources(recipe: Recipe) -> list[Source]:
    return [*recipe.data.train, *(recipe.data.eval or [])]


def _made(path: str, flow: Flow) -> bool:
    return Path(path).is_relative_to(flow.output)
