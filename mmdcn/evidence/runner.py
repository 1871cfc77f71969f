"""Runs, side by side: each in a process with one thread, each result in a file of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from mmdcn import files, machine
from mmdcn.errors import InputError

Tell = Callable[[float], None]


class Job(Protocol):
    """Something that takes minutes and has a result.

    Attributes:
        name: of its result's file.
        seconds: that it takes about.
        needs: the names of jobs that must be finished before.
    """

    name: str
    seconds: float
    needs: tuple[str, ...]

    def settings(self) -> dict:
        """All that the result follows from, as JSON has it."""

    def execute(self, folder: Path, tell: Tell) -> dict:
        """Do it; `tell` is told which part of it is done."""


class Told(Protocol):
    """Is told how jobs go."""

    def progress(self, job: Job, part: float) -> None:
        """Which part of a job is done."""

    def finished(self, job: Job) -> None:
        """A job's result is written."""


def result_file(job: Job, folder: Path) -> Path:
    return folder / f"{job.name}.json"


def read_result(job: Job, folder: Path) -> dict | None:
    """The result of a job that is finished, or None.

    Raises:
        InputError: it is there, but was made with other settings, or cannot be read.
    """
    path = result_file(job, folder)
    try:
        result = json.loads(path.read_text())
        settings = result["run"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}): delete it, and run again") from error
    if settings != job.settings():
        raise InputError(
            f"{path} was made with other settings; choose another --work-dir, or delete that one"
        )
    return result


def unfinished(jobs: Sequence[Job], folder: Path) -> list[Job]:
    """The jobs that have no result yet.

    Raises:
        InputError: see :func:`read_result`.
    """
    return [job for job in jobs if read_result(job, folder) is None]


def run(jobs: Sequence[Job], folder: Path, workers: int, told: Told) -> None:
    """Do jobs, as many at a time as there are workers.

    Args:
        jobs: in their order. What one needs is among them, or finished.
        folder: of the results.
        workers: processes; with one, all is done in this one.
        told: see :class:`Told`.

    Raises:
        RuntimeError: a job failed; the others that had begun are given up.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            with one_thread():
                _execute(job, folder, lambda part, job=job: told.progress(job, part))
            told.finished(job)
        return
    with _workers(min(workers, len(jobs)), folder) as idle:
        _dispatch(list(jobs), idle, told)


def _dispatch(waiting: list[Job], idle: list[Connection], told: Told) -> None:
    busy: dict[Connection, Job] = {}
    while waiting or busy:
        open_names = {job.name for job in (*waiting, *busy.values())}
        for job in [job for job in waiting if not open_names.intersection(job.needs)]:
            if idle:
                connection = idle.pop()
                connection.send(job)
                busy[connection] = job
                waiting.remove(job)
        for connection in wait(list(busy)):
            job = busy[connection]
            try:
                kind, value = connection.recv()
            except EOFError:
                raise RuntimeError(f"{job.name}: its process has died") from None
            if kind == "progress":
                told.progress(job, value)
            elif kind == "finished":
                del busy[connection]
                idle.append(connection)
                told.finished(job)
            elif isinstance(value, InputError):
                raise value
            else:
                raise RuntimeError(f"{job.name} failed:\n{value}")


@contextlib.contextmanager
def _workers(count: int, folder: Path) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, folder), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _work(connection: Connection, folder: Path) -> None:
    """What a worker does until its parent ends it, or is gone."""
    # A terminal interrupts all processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with one_thread(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            job = connection.recv()
            try:
                _execute(job, folder, lambda part: connection.send(("progress", part)))
            except (BrokenPipeError, ConnectionResetError):
                return
            except InputError as error:
                connection.send(("failed", error))
            except Exception:
                connection.send(("failed", traceback.format_exc()))
            else:
                connection.send(("finished", None))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _execute(job: Job, folder: Path, tell: Tell) -> None:
    """Do a job and write its result, with machine and versions."""
    result: dict[str, Any] = job.execute(folder, tell)
    result["machine"] = machine.machine(torch.device("cpu"))
    result["versions"] = machine.versions()
    files.write(result_file(job, folder), json.dumps(result, indent=1) + "\n")
