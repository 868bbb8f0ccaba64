"""From what a user names to a model that can answer: a run folder, an adapter folder, or a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.adapters.config import CONFIG_NAME, PeftConfig, TaskType
from smidgen.errors import UsageError
from smidgen.foreign import contained, read_object
from smidgen.models.folder import check_documents
from smidgen.models.load import load_adapted, load_as, load_model
from smidgen.models.resolve import resolve_model
from smidgen.models.tasks import task_of_config
from smidgen.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Place:
    """Where a model's files are.

    adapter: the adapter's folder; None where there is only a model.
    base: the name of the base model, or of the model itself.
    recipe: the recipe of the run, where the folder is one.
    """

    adapter: Path | None
    base: str
    recipe: Recipe | None

    @property
    def task(self) -> str:
        """What the model does: what the recipe, else the adapter, else the configuration in the model's folder says."""
        if self.recipe:
            return self.recipe.model_task
        if self.adapter:
            task = PeftConfig.from_pretrained(self.adapter).task_type
            return (task or TaskType.CAUSAL_LM).lower()
        return task_of_config(check_documents(Path(self.base)).get("config.json", {})).lower()


def find(name: str | Path, base: str | None = None) -> Place:
    """Find out what `name` is: a run folder, an adapter folder, or the name of a model as recipes take it.

    Args:
        base: the base model of an adapter, where it is no longer where the run or the adapter says.

    Raises:
        UsageError: an adapter names no base model; a run folder holds nothing that was trained yet.
    """
    folder = Path(name)
    written = next((p for p in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if os.path.isfile(p)), None)
    recipe = load_recipe(written)[0] if written else None
    if os.path.isfile(folder / "recipe.yaml"):
        if os.path.isdir(folder / "adapter"):
            folder = folder / "adapter"
        elif os.path.isdir(folder / "model"):
            return Place(None, str(folder / "model"), recipe)
        else:
            raise UsageError(
                f"{folder}: this run holds no adapter/ and no model/: it has not ended; go on with --resume"
            )
    if not os.path.isfile(folder / CONFIG_NAME):
        return Place(None, str(name), None)
    base = base or (recipe.model if recipe else None)
    if base:
        return Place(folder, base, recipe)
    base = read_object(contained(folder, CONFIG_NAME, UsageError), UsageError).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UsageError(f"{folder / CONFIG_NAME}: names no base model (base_model_name_or_path)")
    return Place(folder, base, None)


def open_model(
    place: Place, dtype: str | None = None, *, force: bool = False, say: Callable[[str], None] = print
) -> tuple[Any, Any]:
    """Load what `find` found: the model, adapted where there is an adapter, and the tokenizer with its chat template.

    Args:
        dtype: of the base weights; None: as in the run, or "auto".
        force: load an adapter onto another base than it was trained on.

    Raises:
        ModelError: the model cannot be found or read.
        AdapterFileError: the adapter does not fit it.
    """
    dtype = dtype or (place.recipe.train.dtype if place.recipe else "auto")
    base = resolve_model(place.base)
    if place.adapter is None:
        return load_model(base, dtype, task=place.recipe.model_task if place.recipe else None, say=say)
    return load_adapted(place.adapter, base, **load_as(place.recipe, dtype), force=force, say=say)
