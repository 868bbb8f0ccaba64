"""The choice of threads, from made-up machines: files of /proc and /sys in a folder, and the environment in a dict."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from smidgen import threads
from smidgen.threads import Processors, Usage, for_each, processors, settle, told

FOUR = Processors(8, 4, None)
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells where to look")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    monkeypatch.setattr(threads, "_settled", None)
    monkeypatch.setattr(threads, "processors", lambda: FOUR)


def machine(root: Path, siblings: dict[int, str], cgroup: str = "", **files: str) -> Path:
    """A folder with the files that `processors` reads; `files` by their path with __ for a slash."""
    written = {f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": text for n, text in siblings.items()}
    written |= {name.replace("__", "/"): text for name, text in files.items()} | {"proc/self/cgroup": cgroup}
    for name, text in written.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@needs_affinity
def test_siblings_on_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5})
    root = machine(tmp_path, {0: "0,4\n", 1: "1,5\n", 2: "2,6\n", 5: "1,5\n"})
    assert processors(root) == Processors(logical=4, cores=3, quota=None)


@needs_affinity
@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/seen/from/outside\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (
            "5:memory:/m\n3:cpu,cpuacct:/c\n0::/\n",
            {
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        ("nonsense", {}, None),
    ],
    ids=["v2", "above", "container", "v1", "damaged"],
)
def test_the_smallest_quota_of_all_groups_holds(tmp_path, cgroup, files, quota):
    root = machine(tmp_path, {}, cgroup, **{name.replace("/", "__"): text for name, text in files.items()})
    assert processors(root).quota == quota


def test_where_the_system_tells_nothing_processors_are_counted(tmp_path, monkeypatch):
    found = processors(tmp_path)
    assert found.cores is None and found.quota is None and found.logical >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 6, raising=False)
    assert processors() == Processors(6, None, None)
    assert str(processors()) == "6 processors (their cores are not told here)"


@pytest.mark.parametrize(
    ("found", "processes", "share"),
    [(FOUR, 1, 4), (FOUR, 3, 1), (FOUR, 9, 1), (Processors(8, 4, 2.9), 1, 2), (Processors(8, 4, 0.5), 1, 1)],
)
def test_cores_are_shared_out(found, processes, share):
    assert found.share(processes) == share


@pytest.mark.parametrize(
    ("given", "free", "added"),
    [
        ({}, 7.0, {"OMP_NUM_THREADS": "4"}),
        ({}, None, {"OMP_NUM_THREADS": "4"}),
        ({}, 3.8, {"OMP_NUM_THREADS": "4"}),
        ({}, 3.0, {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "passive"}),
        ({"OMP_NUM_THREADS": "2"}, 3.0, {}),
        ({"MKL_NUM_THREADS": "6"}, 8.0, {"OMP_WAIT_POLICY": "passive"}),
        ({"OMP_NUM_THREADS": "4", "GOMP_SPINCOUNT": "5"}, 0.0, {}),
        ({"OMP_WAIT_POLICY": "active"}, 0.0, {"OMP_NUM_THREADS": "4"}),
        ({"LOCAL_WORLD_SIZE": "2"}, 1.0, {"OMP_NUM_THREADS": "2"}),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"}, None, {"OMP_WAIT_POLICY": "passive"}),
    ],
)
def test_what_is_put_into_the_environment(given, free, added):
    environ = dict(given)
    settle(free, environ)
    assert environ == given | added


def test_the_line_says_what_was_chosen_and_what_was_set():
    environ: dict[str, str] = {}
    assert told(4, environ) == "threads: 4 of 4 cores, waiting as OpenMP does by itself; PyTorch's own choice"
    settle(2.5, environ)
    assert (
        told(4, environ) == "threads: 4 of 4 cores, waiting asleep (2.5 of 8 processors free); OMP_NUM_THREADS not set"
    )
    assert for_each(2, environ) == "2"
    given = {"OMP_NUM_THREADS": "16", "OMP_WAIT_POLICY": "active"}
    settle(8.0, given)
    assert told(16, given) == (
        "threads: 16 of 4 cores, waiting as OMP_WAIT_POLICY=active says; OMP_NUM_THREADS=16 as set. "
        "More threads than the 4 that can run at once: this slows every step"
    )
    assert for_each(2, given) == "16"


def test_the_use_by_others_leaves_out_ones_own(monkeypatch):
    begin = Usage(idle=100.0, own=5.0, when=10.0)
    monkeypatch.setattr(Usage, "now", lambda: Usage(idle=100.2, own=5.3, when=10.5))
    assert begin.free_since() == pytest.approx(1.0)  # 0.4 processors idle, 0.6 busy with this process
    monkeypatch.setattr(Usage, "now", lambda: None)
    assert begin.free_since() is None


def test_commands_settle_and_a_library_changes_nothing():
    code = (
        "import json, os, sys, threading\n"
        "import smidgen; smidgen.__all__; from smidgen import threads\n"
        "before = dict(os.environ)\n"
        "from smidgen.cli.main import _load\n"
        "assert os.environ == before and 'torch' not in sys.modules\n"
        "_load('check')\n"
        "assert 'torch' not in sys.modules\n"
        "added = {name: os.environ[name] for name in os.environ if os.environ[name] != before.get(name)}\n"
        "import torch\n"
        "print(json.dumps([added, torch.get_num_threads(), threads.processors().limit, threads.waiting()]))\n"
    )
    names = (*threads.COUNTS, *threads.WAITING, "LOCAL_WORLD_SIZE")
    environ = {name: value for name, value in os.environ.items() if name not in names}
    run = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
    added, count, limit, how = json.loads(run.stdout)
    assert added.pop("OMP_NUM_THREADS", str(count)) == str(count) == str(limit)
    assert added == ({"OMP_WAIT_POLICY": "passive"} if how.startswith("asleep") else {})
