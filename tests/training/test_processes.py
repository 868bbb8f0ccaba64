"""Two processes that share each update train what one trains."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen.training.loop import read_log
from tests.training.conftest import make_loop, make_rows, tiny_lora

LENGTHS = [5, 12, 7, 3, 9, 16, 4, 11, 6]  # the last update has a single row: one process has none
PROGRAM = """
import sys
from pathlib import Path
from tests.training import test_processes
test_processes.train(Path(sys.argv[1]))
"""


def train(folder: Path) -> None:
    """Train three updates; the first process writes the log and how many there are."""
    rows = make_rows(LENGTHS, prompt=2)
    loop = make_loop(tiny_lora(), rows, folder, held_out=rows, max_steps=3)
    loop.fit()
    if loop.accelerator.is_main_process:
        (folder / "processes").write_text(str(loop.accelerator.num_processes), encoding="utf-8")
    loop.accelerator.wait_for_everyone()
    loop.accelerator.end_training()


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    train(tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    shared = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "two")]
    both = [subprocess.Popen(command, env=shared | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert [(tmp_path / name / "processes").read_text(encoding="utf-8") for name in ("one", "two")] == ["1", "2"]
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    for alone, shared_line in zip(one, two, strict=True):
        for key in {"step", "loss", "grad_norm", "eval_loss"} & alone.keys():
            assert shared_line[key] == pytest.approx(alone[key], rel=1e-4), (alone["step"], key)
