"""Programs in processes of their own, which begin with torch already imported.

Importing torch, and what else the toolbox imports of others, takes several seconds, most of what a
small program takes: it is done once, in a server that is forked for each program. All else is as
in a process that a shell starts, the imports of the toolbox and of mmdcn as well.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.process
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
PRELOADED = [
    *("torch", "torch.distributed.optim", "torch.utils.flop_counter", "torch.export"),
    *("matplotlib.pyplot", "scipy.optimize", "scipy.stats", "cv2", "shapely.geometry"),
    *("pycocotools.mask", "rich.progress", "terminaltables", "hypothesis", "numpy.testing"),
    "tests.unformatted_configs",
]


class Program:
    """A running Python program.

    Args:
        command: its file and its arguments; or ``-c`` and a text, or ``-m`` and a module.
        cwd: where it runs.
        environment: its environment variables.
    """

    def __init__(
        self, command: Sequence[object], cwd: Path, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.command = [str(part) for part in command]
        self._output = tempfile.NamedTemporaryFile(suffix=".txt")  # noqa: SIM115
        self.process = _server().Process(
            target=_run, args=(self.command, str(cwd), dict(environment), self._output.name)
        )
        self.process.start()

    @property
    def output(self) -> str:
        """What it has written to its two streams so far."""
        return Path(self._output.name).read_text()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for its end."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{self.command} runs for more than {timeout} s:\n{self.output}")
        return subprocess.CompletedProcess(self.command, self.process.exitcode, self.output)


def run_python(*command: object, cwd: Path = REPOSITORY, **environment: str) -> str:
    """What a program prints, which must end well: ``run_python("-c", text)``."""
    done = Program(command, cwd, os.environ | {"OMP_NUM_THREADS": "1"} | environment).finish()
    assert done.returncode == 0, done.stdout
    return done.stdout


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    # Idle threads that spin for long slow down whoever else uses the cores.
    quiet = dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="3000")
    with _environment(PYTHONPATH=str(REPOSITORY), **quiet):
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def _environment(**variables: str):
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(command: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """Be the program: this is the first thing that its process does."""
    gc.freeze()  # what the server has imported, which stays
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    path = environment.get("PYTHONPATH", "")
    folder = "" if command[0] in ("-c", "-m") else os.path.dirname(command[0])
    sys.path[:0] = [folder, *path.split(os.pathsep)]
    # Shells ignore interruptions on behalf of what they run in the background, tests included.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A program that a shell starts is no worker of another.
    multiprocessing.process._parent_process = None
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(command[1], "<string>", "exec"), vars(main))
    elif command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
