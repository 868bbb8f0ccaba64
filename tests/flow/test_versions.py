"""The oldest releases that may be installed train what the newest train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.flow import short_run
from tests.training.conftest import write_recipe

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".venv-test" / "oldest"  # made by 'make test'
ONE_RELEASE = {"torch"}  # a second one is too large to fetch: its oldest release is the one that everything runs on


def pins(name: str) -> dict[str, str]:
    """The releases that a constraints file pins, by package."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(each.name): str(each.specifier).removeprefix("==") for each in pinned}


def bounds() -> dict[str, str]:
    """The oldest release of each package that the project depends on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(line) for line in project["dependencies"]]
    return {
        canonicalize_name(each.name): bound.version
        for each in needed
        for bound in each.specifier
        if bound.operator == ">="
    }


def test_the_oldest_releases_allowed_are_the_ones_tested():
    tested = pins("constraints-oldest.txt") | {name: pins("constraints.txt")[name] for name in ONE_RELEASE}
    assert bounds() == {name: tested.get(name) for name in bounds()}


def on_oldest(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run Python with the oldest releases before the installed ones."""
    if not (OLDEST / "ready").exists():
        pytest.skip(f"{OLDEST} is missing: 'make test' puts the oldest releases there")
    paths = [str(path) for path in (OLDEST, ROOT / "src", ROOT)]
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SMIDGEN_CACHE": str(folder / "cache")},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_oldest_and_newest_releases_train_the_same(stories260k, tmp_path, monkeypatch):
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "oldest").mkdir()
    done = on_oldest(tmp_path, "-m", "tests.flow.short_run", str(stories260k), str(tmp_path / "oldest"))
    oldest, newest = json.loads(done.stdout.splitlines()[-1]), short_run.short_run(stories260k, tmp_path)
    pinned = pins("constraints-oldest.txt")
    assert oldest["versions"] == {name: pinned[canonicalize_name(name)] for name in oldest["versions"]}
    assert newest["versions"]["transformers"] != oldest["versions"]["transformers"]
    assert oldest["labels"] == newest["labels"]
    assert len(newest["losses"]) == 20 and newest["losses"][-1] < newest["losses"][0]
    assert oldest["losses"] == pytest.approx(newest["losses"], abs=1e-4)
    assert oldest["proof"] == newest["proof"] and all(newest["proof"].values())


@pytest.mark.slow
def test_every_command_works_on_the_oldest_releases(tmp_path):
    use = str(Path(__file__).with_name("use.py"))
    done = on_oldest(tmp_path, use, str(tmp_path), str(write_recipe(tmp_path)))
    assert done.stdout.splitlines()[-1] == "END"
