"""``smidgen evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smidgen.cli.options import Base, Force
from smidgen.errors import UsageError
from smidgen.recipe import Source

if TYPE_CHECKING:
    from smidgen.models.open import Place


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder, or an adapter folder.")],
    data: Annotated[str | None, typer.Option(help="Held-out rows; default: the evaluation file of the run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of each file.")] = None,
    few_shot: Annotated[int, typer.Option(min=0, help="Solved examples that the base is shown in a second try.")] = 0,
    few_shot_data: Annotated[str | None, typer.Option(help="Their file; default: the run's training file.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Tell the base this in words, in a try of its own; default: what a prompt says.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows generated at once.")] = 64,
    base: Base = None,
    force: Force = False,
) -> Any:
    """Compare base and tuned on held-out rows."""
    from smidgen.adapters.base import OnModel
    from smidgen.evaluation.compare import choose_few_shot, compare, read_examples
    from smidgen.models.open import find, open_model
    from smidgen.models.peft_model import method_of

    place = find(run, base)
    if place.task != "causal_lm":
        return _score(place, data, limit, force)
    if place.adapter is None:
        raise UsageError(f"{run}: holds no adapter, so there is no base to compare with")
    recipe = place.recipe
    source = _source(data, recipe.data.eval if recipe else None, "--data")
    shots = []
    if few_shot:
        shots_source = _source(few_shot_data, recipe.data.train if recipe else None, "--few-shot-data")
        shots = choose_few_shot(shots_source, few_shot, seed=recipe.seed if recipe else 0)
    model, tokenizer = open_model(place, force=force)
    config = model.peft_config[model.active_adapter]
    instruction = instruction or getattr(config, "prompt_tuning_init_text", None)
    if issubclass(method_of(config), OnModel) and not instruction:
        typer.echo("no words to compare the prompt with: give --instruction TEXT, which tells the base what to do")
    found = compare(
        model,
        tokenizer,
        read_examples(source, limit),
        few_shot=shots,
        hard_prompt=instruction,
        system=recipe.data.system if recipe else None,
        batch_size=batch_size,
        progress=typer.echo,
    )
    for line in found.lines():
        typer.echo(line)
    typer.echo(f"chat with it: smidgen chat {run}")
    return found


def _score(place: Place, data: str | None, limit: int | None, force: bool) -> None:
    from smidgen.data.tasks import read_files
    from smidgen.evaluation.rewards import Scored, Scorer, score_files
    from smidgen.evaluation.tasks import score
    from smidgen.models.open import open_model
    from smidgen.models.rewards import kind_of_reward

    recipe = place.recipe
    columns = recipe.data.train[0].columns if recipe else None
    sources = (
        [Source(data, columns=columns)] if data else [_source(None, recipe.data.eval if recipe else None, "--data")]
    )
    model, tokenizer = open_model(place, force=force)
    if kind_of_reward(model):
        found = Scored()
        for _ in score_files(Scorer(model, tokenizer, recipe), sources, found, limit, typer.echo):
            pass
        for line in found.lines():
            typer.echo(line)
        return
    files = read_files(sources, place.task, limit)
    found = score(
        model,
        tokenizer,
        files,
        place.task,
        max_length=recipe.data.max_length if recipe else None,
        progress=typer.echo,
    )
    for line in found:
        typer.echo(line)


def _source(given: str | None, recipe: list[Source] | None, option: str) -> Source:
    if given:
        return Source(given)
    if not recipe:
        raise UsageError(f"{option} FILE is needed: the run names no such file")
    return recipe[0]
