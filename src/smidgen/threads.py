"""How many threads a command computes with, and how they wait for each other.

OpenMP's threads wait awake for the next task, which is the fastest where each has a core to itself. Where others want
the cores too, the awake keep the one that has work from running, and a step takes many times as long; there, waiting
asleep is right. OpenMP reads the environment when PyTorch is loaded, so commands settle it before that. What the user
has set stays, and who imports smidgen as a library finds nothing changed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import psutil

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # PyTorch asks in this order
POLICY = "OMP_WAIT_POLICY"
WAITING = (POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # each says how OpenMP's threads wait
_LOOK = 0.1  # seconds between two looks at the processors: their clocks tick a hundred times a second
_SLACK = 0.25  # of a processor that others may use while ours wait awake


@dataclass(frozen=True)
class Processors:
    """What this process may compute on.

    logical: processors that it may be scheduled on. cores: those of them that share no core with another; None where
    the system does not tell. quota: how many processors' time its control group gets; None: all.
    """

    logical: int
    cores: int | None
    quota: float | None

    @property
    def limit(self) -> int:
        """How many threads can compute at the same time without taking from each other."""
        cores = self.cores or self.logical
        return max(1, min(cores, int(self.quota))) if self.quota else cores

    def share(self, processes: int) -> int:
        """Threads for each of some processes."""
        return max(1, self.limit // processes)

    def __str__(self) -> str:
        text = f"{self.cores} cores" if self.cores else f"{self.logical} processors (their cores are not told here)"
        return text + (f" (quota {self.quota:g})" if self.quota else "")


def processors(root: Path = Path("/")) -> Processors:
    """Ask the system; `root` is where /proc and /sys lie, which only Linux has."""
    if not hasattr(os, "sched_getaffinity"):
        return Processors(getattr(os, "process_cpu_count", os.cpu_count)() or 1, None, None)
    allowed = os.sched_getaffinity(0)
    topology = [root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list" for number in allowed]
    try:
        cores = len({path.read_text(encoding="ascii").strip() for path in topology})
    except OSError:
        cores = None
    return Processors(len(allowed), cores, min(_quotas(root), default=None))


def _quotas(root: Path) -> Iterator[float]:
    """The limits of the control groups that this process is in, of version 1 and 2, and of the groups above them."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            group = PurePosixPath(name)
            for part in (group, *group.parents):
                folder = root / "sys/fs/cgroup" / controllers / part.relative_to("/")
                with suppress(OSError, ValueError):  # no limit: "max", -1, or no such file
                    if controllers:
                        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                        quota, period = (int((folder / file).read_text(encoding="ascii")) for file in files)
                    else:
                        quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
                    if quota > 0:
                        yield quota / period


# ---- who else computes ----


@dataclass(frozen=True)
class Usage:
    """A look at the clocks of the processors that this process may use, in seconds."""

    idle: float
    own: float = field(default_factory=time.process_time)
    when: float = field(default_factory=time.perf_counter)

    @classmethod
    def now(cls) -> Usage | None:
        """None where the system does not tell."""
        try:
            times = psutil.cpu_times(percpu=True)
        except OSError:
            return None
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(times))
        return cls(sum(times[number].idle for number in allowed if number < len(times)))

    def free_since(self) -> float | None:
        """How many processors no other process has used since this look, which is at least a tenth of a second ago."""
        time.sleep(max(0.0, self.when + _LOOK - time.perf_counter()))
        now = Usage.now()
        return (now.idle - self.idle + now.own - self.own) / (now.when - self.when) if now else None


# ---- the choice ----


@dataclass(frozen=True)
class Settled:
    """What was put into the environment, and how many processors were free then."""

    added: Mapping[str, str] = field(default_factory=dict)
    free: float | None = None


_settled: Settled | None = None


def settle(free: float | None, environ: MutableMapping[str, str] = os.environ) -> None:
    """Choose the number of threads and how they wait, and put both into the environment where the user has not.

    To be called before PyTorch is loaded. One thread for each core that the process has for itself; among `cores // n`
    each of n processes on this machine. They wait asleep where there are more of them than processors free.

    Args:
        free: how many processors nobody else uses, as `Usage.free_since` answers it; None: not known.
    """
    global _settled
    found, processes = processors(), int(environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > 1:
        free = None  # they start together, and each would take the others for strangers
    added = {}
    if not any(environ.get(name) for name in COUNTS) and (found.cores or processes > 1):
        added[COUNTS[0]] = str(found.share(processes))
    asked = next((value for name in COUNTS if (value := environ.get(name) or added.get(name))), "")
    count = int(asked) if asked.isdigit() else found.share(processes)
    room = found.limit if free is None else min(found.limit, free + _SLACK)
    if not any(environ.get(name) for name in WAITING) and count * processes > room:
        added[POLICY] = "passive"
    environ.update(added)
    _settled = Settled(added, free)


def for_each(processes: int, environ: Mapping[str, str] = os.environ) -> str:
    """OMP_NUM_THREADS for each of some processes that are to be started: what the user set, or their share."""
    return _given(COUNTS[:1], environ).get(COUNTS[0]) or str(processors().share(processes))


def _given(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Which of these variables the user has set, and to what."""
    added = _settled.added if _settled else {}
    return {name: environ[name] for name in names if environ.get(name) and environ[name] != added.get(name)}


def waiting(environ: Mapping[str, str] = os.environ) -> str:
    """How the threads wait, and why: ``asleep (1.0 of 2 processors were free)``."""
    if given := _given(WAITING, environ):
        return f"as {_listed(given)} says"
    if _settled is None:
        return "as OpenMP does by itself"
    free = "" if _settled.free is None else f" ({_settled.free:.1f} of {processors().logical} processors free)"
    return ("asleep" if POLICY in _settled.added else "awake") + free


def told(count: int, environ: Mapping[str, str] = os.environ) -> str:
    """One line about the `count` threads that PyTorch uses: ``threads: 2 of 2 cores, waiting awake (...)``."""
    found = processors()
    processes = int(environ.get("LOCAL_WORLD_SIZE", "1"))
    line = f"threads: {count} of {found}"
    line += f" in each of {processes} processes" if processes > 1 else ""
    line += f", waiting {waiting(environ)}; "
    given = _given(COUNTS, environ)
    line += f"{_listed(given)} as set" if given else f"{COUNTS[0]} not set" if _settled else "PyTorch's own choice"
    if count * processes > found.limit:
        line += f". More threads than the {found.limit} that can run at once: this slows every step"
    return line


def _listed(variables: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in variables.items())
