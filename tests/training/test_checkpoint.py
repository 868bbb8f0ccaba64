"""Checkpoints: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smidgen.errors import TrainingStopped, UsageError
from smidgen.training import checkpoint
from smidgen.training.guards import check_disk
from tests.training.conftest import make_loop, make_rows, tiny_lora

ROWS = make_rows([6, 8, 5, 7])
KILLED = """
import os, sys
from pathlib import Path
from smidgen.training import checkpoint
from tests.training.conftest import make_loop, make_rows, tiny_lora
loop = make_loop(tiny_lora(), make_rows([6, 8, 5, 7]), Path(sys.argv[1]))
loop.step = 1
loop.save()
loop.step = 2
checkpoint.save_file = lambda *a, count=[0]: count.__setitem__(0, count[0] + 1) or count[0] < 2 or os._exit(9)
loop.save()
"""


def test_a_process_killed_while_saving_leaves_the_earlier_checkpoint(tmp_path):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    assert process.returncode == 9
    assert (tmp_path / "checkpoints" / ".step-2.partial").exists()
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found and found.step == 1
    loop = make_loop(tiny_lora(seed=8), ROWS, tmp_path)
    loop.resume(found)
    loop.step = 2
    loop.save()
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest and newest.step == 2


@pytest.fixture
def full_disk() -> Iterator[Callable[[int], None]]:
    """Answers a function after whose call no file grows beyond so many bytes: the writing library itself fails."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1000, 30_000])
def test_a_full_disk_stops_the_run_and_keeps_what_there_is(tmp_path, full_disk, room):
    loop = make_loop(tiny_lora(), ROWS, tmp_path, max_steps=3, save_steps=3)
    loop.fit()
    loop.step = 4
    full_disk(room)  # the weights are smaller than the last, the optimizer's moments larger
    with pytest.raises(TrainingStopped, match=r"could not be written: .*step 3 is intact"):
        loop.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_room_for_the_next_checkpoint_is_looked_at_before_it_is_written(tmp_path, monkeypatch):
    loop = make_loop(tiny_lora(), ROWS, tmp_path)
    loop.step = 3
    loop.save()
    loop.step = 4
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(TrainingStopped, match=r"GB are needed .*step 3 is intact"):
        loop.save()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_tensors_that_are_not_finite_are_never_saved(tmp_path):
    loop = make_loop(tiny_lora(), ROWS, tmp_path)
    name, parameter = next(iter(loop.parameters.items()))
    with torch.no_grad():
        parameter[0, 0] = torch.nan
    with pytest.raises(TrainingStopped, match=f"1 tensors .*not finite: {name}"):
        loop.save()
    assert not (tmp_path / "checkpoints").exists()


def test_only_the_newest_are_kept(tmp_path):
    loop = make_loop(tiny_lora(), ROWS, tmp_path, max_steps=12, save_steps=1, save_total_limit=2)
    loop.fit()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-11", "step-12"]
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found and found.step == 12


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path):
    loop = make_loop(tiny_lora(), ROWS, tmp_path, max_steps=1)
    loop.fit()
    assert {path.suffix for path in loop.save().iterdir()} == {".safetensors", ".json"}


def test_all_random_generators_are_put_back(tmp_path):
    loop = make_loop(tiny_lora(), ROWS, tmp_path)
    loop.save()

    def draw():
        return random.random(), float(np.random.rand()), torch.rand(1).item(), random.gauss(0, 1)

    expected = draw()
    found = checkpoint.latest(tmp_path / "checkpoints")
    assert found and draw() != expected
    found.restore(loop.model, loop.optimizer)
    assert draw() == expected


def test_another_format_is_refused(tmp_path):
    folder = make_loop(tiny_lora(), ROWS, tmp_path).save()
    state = folder / "state.json"
    known = f'"format": {checkpoint.FORMAT}'
    state.write_text(state.read_text(encoding="utf-8").replace(known, '"format": 7'), encoding="utf-8")
    with pytest.raises(UsageError, match=f"checkpoint format 7, this version reads {checkpoint.FORMAT}"):
        checkpoint.latest(tmp_path / "checkpoints")


def test_missing_disk_space_is_told_before_the_start(tmp_path):
    check_disk(tmp_path / "not" / "there", 1000)
    with pytest.raises(UsageError, match=r"1000000000.00 GB are needed .*GB are free"):
        check_disk(tmp_path, 10**18)
