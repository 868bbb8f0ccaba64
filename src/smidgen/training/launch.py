"""Starts the processes of a run on this machine, ends them together, and lets one of them tell what went wrong.

Each process gets what torchrun would give it (RANK, WORLD_SIZE, MASTER_ADDR...), so that a run does not see who started
it. torch's own launcher kills what has not ended 30 seconds after a Ctrl-C, which may be shorter than an update and its
checkpoint, and reports a failure by a stack of tracebacks; therefore it is not used. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from smidgen import threads
from smidgen.errors import UsageError

GRACE = 10.0  # seconds for the others to end by themselves once one has failed
_FAILED = "smidgen/failed"


def rank() -> int:
    """The number of this process among those of the run, from 0."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes a launcher says that the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch(count: int, command: Sequence[str], say: Callable[[str], None]) -> int:
    """Run a command in `count` processes until all have ended.

    Ctrl-C and SIGTERM are passed on to all of them, and waited for. When one fails, the others are ended.

    Returns:
        0, or the exit code of the process that failed first.

    Raises:
        UsageError: these processes were started by a launcher already.
    """
    if world() > 1:
        raise UsageError(f"--processes: a launcher has started {world()} processes already; leave it out")
    each = threads.for_each(count)
    say(f"processes: {count}, {each} threads each ({threads.processors()})")
    shared = os.environ | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": each,
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # who lost whom when one has failed
    }
    started: list[subprocess.Popen[bytes]] = []
    with _passing_signals(started):
        for number in range(count):
            started.append(_start(command, shared | {"RANK": str(number), "LOCAL_RANK": str(number)}))
        return _wait(started)


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C reaches the launcher alone, which passes it on once.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [process.poll() for process in started]
        failed = [(code > 0, number) for number, code in enumerate(codes) if code]
        if failed:
            break
        if None not in codes:
            return 0
        time.sleep(0.05)
    _, number = min(failed)  # one that was killed is the cause of what the others report
    end = time.monotonic() + GRACE
    for process in started:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    code = codes[number] or 1
    if code > 0:
        return code
    name = signal.Signals(-code).name
    hint = "; was there too little memory for so many?" if name == "SIGKILL" else ""
    print(f"error: process {number} was ended by {name}{hint}", file=sys.stderr)
    return 1


@contextmanager
def _passing_signals(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, frame: object) -> None:
        for process in started:
            if process.poll() is None and os.name != "nt":  # there, the terminal tells every process itself
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- one voice ----


@contextmanager
def one_voice() -> Iterator[None]:
    """In a run of several processes, let the first to fail tell its error; all leave with its exit code."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if world() == 1:
            raise
        own = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        teller, code = _first_failure(own, alike=hasattr(error, "exit_code"))
        if teller:
            raise
        sys.exit(code)


def _first_failure(code: int, alike: bool) -> tuple[bool, int]:
    """Whether this process failed first, and the exit code of the one that did.

    Args:
        alike: whether, before the processes know each other, all fail alike.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return rank() == 0 or not alike, code
    try:
        store = dist.distributed_c10d._get_default_store()
        teller, first = store.compare_set(_FAILED, "", f"{rank()} {code}").decode().split()
    except RuntimeError:  # the process that keeps the store has failed, and told
        return False, code
    return int(teller) == rank(), int(first)
