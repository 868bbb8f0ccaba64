"""Every hostile case is refused in plain words, quickly, in little memory, and runs nothing."""

from __future__ import annotations

import faulthandler
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import smidgen
import tests.hostile.folders
import tests.hostile.texts  # noqa: F401  (importing them fills CASES)
from smidgen.adapters import targets
from smidgen.data import metering
from smidgen.errors import SmidgenError
from tests.hostile.cases import CASES, DOORS, Case, marker, model_folder, pickled

SECONDS = 2.0
MEGABYTES = 300
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def _megabytes(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the block takes more than SECONDS of processor time, or (on Linux) more than MEGABYTES of memory."""
    measured = CLEAR.exists()
    if measured:
        CLEAR.write_text("5")  # the peak starts anew
    before, begin = _megabytes("VmRSS") if measured else 0, time.process_time()
    faulthandler.dump_traceback_later(60, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    taken = time.process_time() - begin
    assert taken < SECONDS, f"{taken:.1f} s"
    if measured:
        grown = _megabytes("VmHWM") - before
        assert grown < MEGABYTES, f"{grown:.0f} MB"


@pytest.fixture(scope="session", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Load what a good input loads, so that the time of a case is its own."""
    import pyarrow.parquet  # noqa: F401

    from tests.hostile.cases import adapter_folder, checkpoint_folder, read_adapter, read_checkpoint, read_model

    folder = tmp_path_factory.mktemp("good")
    read_model(model_folder(folder))
    read_adapter(adapter_folder(folder))
    read_checkpoint(checkpoint_folder(folder))
    gc.collect()
    gc.freeze()  # what was loaded is not looked through again


def _parameters() -> list[object]:
    return [
        pytest.param(case, id=case.name.replace(" ", "-"), marks=[pytest.mark.slow] if case.slow else [])
        for case in CASES
    ]


@pytest.mark.parametrize("case", _parameters())
def test_a_hostile_case_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = case.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metering, "SECONDS", 0.1)  # as long as it takes, nothing else depends on it
    monkeypatch.setattr(targets, "_PATTERN_SECONDS", 0.1)
    read, kinds = DOORS[case.door]
    with bounded():
        try:
            read(path)
        except SmidgenError as error:
            refusal = error
        else:
            pytest.fail("it was accepted")
    assert isinstance(refusal, kinds), f"{type(refusal).__name__}: {refusal}"
    assert case.words in str(refusal)
    assert len(str(refusal)) < 20_000
    assert not marker(tmp_path).exists()


def test_the_corpus_is_large_and_its_names_differ() -> None:
    assert len(CASES) >= 70
    assert len({case.name for case in CASES}) == len(CASES)


def test_good_input_is_read(tmp_path: Path) -> None:
    from tests.hostile.cases import adapter_folder, read_adapter, read_data, read_model, read_template
    from tests.hostile.texts import CHAT, PAIR

    (tmp_path / "good.jsonl").write_text(str(PAIR).replace("'", '"') + "\n")
    (tmp_path / "good.jinja").write_text(CHAT)
    read_data(tmp_path / "good.jsonl")
    read_template(tmp_path / "good.jinja")
    read_model(model_folder(tmp_path))
    read_adapter(adapter_folder(tmp_path))


@pytest.mark.slow
def test_the_command_line_tells_it_without_a_traceback(tmp_path: Path) -> None:
    """A few cases in a process of their own, as a user meets them."""
    folder = model_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(tmp_path))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {folder}\nadapter: {{method: lora}}\ndata: {{train: none.jsonl}}\noutput: run\n")
    weights = tmp_path / "weights.pt"
    weights.write_bytes(pickled(tmp_path))
    source = Path(smidgen.__file__).parents[1]
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text("a: &a [*a]")
    for command in (["check", recipe], ["generate", folder, "hello"], ["generate", weights, "hello"], ["check", bomb]):
        done = subprocess.run(
            [sys.executable, "-m", "smidgen", *map(str, command)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])},
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert not marker(tmp_path).exists()
