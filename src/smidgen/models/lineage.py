"""Lineage: what a run or a merged model was made from, with hashes, and whether all of that is still as it was.

It is the part ``lineage`` of ``record.json``, which each run folder and each merged model has. Hashes are SHA-256.
Files are named relative to the folder of the record, so that what moves together stays together. Nothing here loads
torch, unless two fingerprints differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from smidgen.checking import build, wrong_values
from smidgen.data.read import data_files
from smidgen.drafts import dotted
from smidgen.errors import UsageError
from smidgen.foreign import read_object
from smidgen.proofs import RECORD_NAME, Check
from smidgen.recipe import Recipe, difference, load_recipe, recipe_hash

_WEIGHTS = ("*.safetensors", "adapter_config.json")
_DEEPEST = 100  # generations


@dataclass(frozen=True)
class Parent:
    """What training or merging started from: an adapter, with its files, or a model that smidgen made."""

    role: Literal["adapter", "model"]
    folder: str
    files: dict[str, str]


@dataclass(frozen=True)
class Lineage:
    """What is recorded: the parents, the hash of the recipe, and hashes of the data and of what was saved, by file."""

    parents: list[Parent]
    recipe: str | None
    data: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """A run, a merged model or an adapter, as a part of the tree.

    kind: "run", "merged model", "adapter", "model", or "missing".
    role: what of it the child started from; None at the root.
    told: the base, with its fingerprint, and the recipe.
    changed: how the child's recipe differs from the parent's, at the child.
    checks: what was verified.
    """

    folder: Path
    kind: str
    role: str | None
    told: list[str]
    changed: list[str]
    checks: list[Check]
    parents: list[Node]

    def all_checks(self) -> list[Check]:
        """The checks of the whole tree."""
        return [*self.checks, *(check for parent in self.parents for check in parent.all_checks())]

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain values."""
        return json.loads(json.dumps(asdict(self), default=lambda path: path.as_posix()))


# ---- recording ----


def begin_lineage(recipe: Recipe, init_adapter: Path | None, folder: Path) -> Lineage:
    """The lineage of a run that begins in `folder`; what it saves is hashed at its end."""
    sources = [*recipe.data.train, *(recipe.data.eval or [])]
    files = [file for source in sources for file in data_files(source.path)]
    return Lineage(parents_of(recipe.model, init_adapter, folder), recipe_hash(recipe), hashes(files, folder))


def parents_of(model: str, adapter: Path | None, beside: Path) -> list[Parent]:
    """What an adapter, if any, and a base model are of smidgen's making; a model from elsewhere has no record."""
    parents = []
    if adapter is not None:
        parents.append(Parent("adapter", _named(adapter, beside), hashes(weight_files(adapter), adapter)))
    if os.path.isdir(model) and (_home(Path(model)) / RECORD_NAME).is_file():
        parents.append(Parent("model", _named(Path(model), beside), {}))  # the fingerprint says whether it is the same
    return parents


def weight_files(folder: Path) -> list[Path]:
    """The files of an adapter or a model that decide what it answers."""
    return sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))


def hashes(files: Iterable[Path], beside: Path) -> dict[str, str]:
    """The SHA-256 of files, by their names as seen from a folder."""
    return {_named(file, beside): sha256(file) for file in files}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(path: Path, beside: Path) -> str:
    """A path as seen from a folder; on Windows it may lie on another drive, and stays absolute."""
    try:
        return Path(os.path.relpath(path.resolve(), beside.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


# ---- reading ----


def read_lineage(folder: Path) -> Node:
    """The tree of ancestors of a run folder, an adapter folder or a merged model, verified as far as files can tell.

    Raises:
        UsageError: nothing is there, it holds no record, or a record is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    if not (_home(folder) / RECORD_NAME).is_file():
        raise UsageError(f"{folder}: holds no {RECORD_NAME}; name the folder of a finished run, or of a merged model")
    return _node(_home(folder), None, 0)


def _home(folder: Path) -> Path:
    """The run folder of the adapter or model inside it; else the folder itself."""
    place = folder.resolve()
    inner = place.name in ("adapter", "model") and (place.parent / RECORD_NAME).is_file()
    return _shown(place.parent if inner else place)


def _shown(path: Path) -> Path:
    """A path as it is told: relative to the working directory, where it lies in it."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _node(folder: Path, role: str | None, depth: int) -> Node:
    if depth > _DEEPEST:
        raise UsageError(f"{folder}: more than {_DEEPEST} generations: its ancestors lead back to itself")
    if not folder.is_dir():
        return Node(folder, "missing", role, [], [], [_check(folder, "folder", "is missing")], [])
    if not (folder / RECORD_NAME).is_file():
        kind = "adapter" if (folder / "adapter_config.json").is_file() else "model"
        return Node(folder, kind, role, ["not made by a run that is here"], [], [], [])
    record = read_object(folder / RECORD_NAME, UsageError)
    lineage = _lineage(folder, record)
    recipe = load_recipe(folder / "recipe.yaml")[0] if lineage.recipe and (folder / "recipe.yaml").is_file() else None
    told = [f"base: {record.get('base')} (fingerprint {str(record.get('base_fingerprint'))[:12]})"]
    told += [f"recipe: {lineage.recipe}"] if lineage.recipe else []
    checks = [_verified(folder, "saved", name, expected) for name, expected in lineage.files.items()]
    checks += [_verified(folder, "data", name, expected) for name, expected in lineage.data.items()]
    if lineage.recipe:
        wrong = "is missing" if recipe is None else "changed since" * (recipe_hash(recipe) != lineage.recipe)
        checks.append(_check(folder / "recipe.yaml", "recipe", wrong))
    parents, changed = [], []
    for parent in lineage.parents:
        place = _inside(folder, parent.folder)
        node = _node(_home(place), parent.role, depth + 1)
        parents.append(node)
        if node.kind != "missing":
            checks += [_verified(place, "parent", name, expected) for name, expected in parent.files.items()]
        if node.kind in ("run", "merged model") and parent.role == "model":
            checks.append(_same_weights(folder, record, node.folder))
        if recipe and (node.folder / "recipe.yaml").is_file():
            lines = difference(load_recipe(node.folder / "recipe.yaml")[0], recipe)
            changed += [line for line in lines if not line.startswith("output:")]
    return Node(folder, "run" if lineage.recipe else "merged model", role, told, changed, checks, parents)


def _lineage(folder: Path, record: dict[str, Any]) -> Lineage:
    path = folder / RECORD_NAME
    try:
        return build(Lineage, record.get("lineage", {}))
    except ValidationError as error:
        found = wrong_values(error, record.get("lineage", {}))
        wrong = [f"{dotted(('lineage', *where))} {message}" for where, message in found] or ["fields are missing"]
        raise UsageError(f"{path}: holds no lineage that can be read: {'; '.join(wrong)}") from None


def _inside(folder: Path, name: str) -> Path:
    if name.startswith(("\\\\", "//")):
        raise UsageError(f"{folder / RECORD_NAME}: refused: {name} is a network share")
    return _shown(folder / name)


def _verified(folder: Path, name: str, file: str, expected: str) -> Check:
    path = _inside(folder, file)
    if not os.path.isfile(path):
        return _check(path, name, "is missing")
    return _check(path, name, "changed since" * (sha256(path) != expected))


def _same_weights(child: Path, record: dict[str, Any], parent: Path) -> Check:
    here, there = record.get("base_fingerprint"), read_object(parent / RECORD_NAME, UsageError).get("fingerprint")
    same = here == there
    if not same and isinstance(here, str) and isinstance(there, str):
        from smidgen.models.fingerprint import same_base

        same = same_base(here, there)
    return _check(parent, "parent", "" if same else f"holds other weights than those that {child} started from")


def _check(path: Path, name: str, wrong: str) -> Check:
    return Check(name, not wrong, f"{name}: {path.as_posix()} {wrong or 'as recorded'}", {})
