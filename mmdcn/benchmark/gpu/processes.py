"""Processes that end with those that started them."""

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
# Loaded here, as little may be done between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process as soon as the one that started it ends, however it does.

    Args:
        parent: the identifier of that process, where it is known: it may have ended by now.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def start(command: Sequence[str | Path], log: IO, own_group: bool = False, **options):
    """Start a process that dies with this one, its output appended to a file.

    With `own_group` it leads a process group, which :func:`end` kills as a whole; otherwise it
    stays in this process's group.
    """
    return subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=own_group,
        preexec_fn=functools.partial(die_with_parent, os.getpid()),
        **options,
    )


def end(process: subprocess.Popen) -> None:
    """Kill a process that leads a group, and everything in the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running(command: Sequence[str | Path], log: IO, **options) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, of which nothing is left when the block ends."""
    process = start(command, log, own_group=True, **options)
    try:
        yield process
    finally:
        end(process)


def run(command: Sequence[str | Path], log: Path, **options) -> tuple[int, str]:
    """Run a process in this one's group to its end; returns its status and its output."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        status = start(command, stream, **options).wait()
    return status, log.read_text(errors="replace")


def turn_termination_into_an_exception() -> None:
    """So that those who are asked to end clean up, and take their children with them."""

    def leave(number, frame):
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def wait(process: subprocess.Popen, seconds: float, step: float = 0.1) -> int | None:
    """The status of a process, or None if it does not end within the time."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(step)
    return process.poll()
