"""Nothing reaches for the network while files are local, and nothing warns: watched in a namespace without a route."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import write_recipe

ROOT = Path(__file__).parents[2]
NETWORK = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)"


def watched(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """Run Python as someone does who set nothing up; answer what it said, and its attempts to reach the network."""
    unset = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "PYTHONWARNINGS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT / "tests" / "flow" / "watch", ROOT / "src")),
        "NETWORK_LOG": str(folder / "network.log"),
        "SMIDGEN_CACHE": str(folder / "cache"),
        "HF_HOME": str(folder / "hub"),
        "COLUMNS": "200",
    }
    alone = ["unshare", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        alone = []  # the watch alone
    done = subprocess.run(
        [*alone, sys.executable, *arguments],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    log = folder / "network.log"
    return done, log.read_text(encoding="utf-8").splitlines() if log.exists() else []


def warned(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "warn" in line.lower()]


def test_the_watch_sees_an_attempt(tmp_path):
    done, attempts = watched(tmp_path, "-c", NETWORK)
    assert done.returncode == 1 and attempts[0].startswith("socket.getaddrinfo ('192.0.2.1', 9")
    assert any(attempt.startswith("socket.connect") for attempt in attempts)


def test_commands_and_library_stay_local_and_say_no_warning(tmp_path):
    folder = tmp_path / "mein Ordner é 日本"
    folder.mkdir()
    done, attempts = watched(folder, str(ROOT / "tests" / "flow" / "use.py"), str(folder), str(write_recipe(folder)))
    assert done.returncode == 0, done.stderr
    assert attempts == []
    assert warned(done) == []
    lines = done.stdout.splitlines()
    assert lines.count("BEGIN") == lines.count("END") == 1  # no process began the script anew
    assert not (folder / "hub").exists()


@pytest.mark.slow
def test_each_command_in_a_process_of_its_own_stays_local(tmp_path):
    recipe = str(write_recipe(tmp_path))
    for command in (
        ["--help"],
        ["methods"],
        ["check", recipe],
        ["train", recipe],
        ["train", recipe, "output=second", "--init-adapter", "run/adapter"],
        ["verify", "run"],
        ["evaluate", "run", "--data", "rows.jsonl"],
        ["generate", "run", "what is the colour of the sky"],
        ["chat", "run"],
        ["merge", "run", "merged"],
        ["inspect", "merged"],
    ):
        done, attempts = watched(tmp_path, "-m", "smidgen", *command)
        assert done.returncode == 0, (command, done.stderr)
        assert (attempts, warned(done)) == ([], []), command
