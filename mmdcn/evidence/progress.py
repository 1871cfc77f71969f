"""How far jobs are: a bar with an estimate on a terminal, and a line for each job elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .runner import Job

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter:
    """Tells of jobs on the standard error.

    What is left is estimated from what jobs are expected to take, and what those took that are
    done.

    Args:
        jobs: those that are to be done.
    """

    def __init__(self, jobs: Sequence[Job], bar: Progress | None = None) -> None:
        self._total = sum(job.seconds for job in jobs)
        self._count = len(jobs)
        self._done = 0.0
        self._finished = 0
        self._parts: dict[str, float] = {}
        self._start = time.monotonic()
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=self._total, left="")

    def progress(self, job: Job, part: float) -> None:
        """See :class:`~.runner.Told`."""
        self._parts[job.name] = part * job.seconds
        self._show(job)

    def finished(self, job: Job) -> None:
        """See :class:`~.runner.Told`."""
        self._parts.pop(job.name, None)
        self._done += job.seconds
        self._finished += 1
        self._show(job)
        if self._bar is None:
            left = self.left()
            text = f"[{self._finished}/{self._count}] {job.name}"
            print(text + (f", {left} left" if left else ""), file=sys.stderr, flush=True)

    def left(self) -> str:
        """The time that is left, in words; nothing while there is nothing to go by."""
        done = self._done + sum(self._parts.values())
        if not done or done >= self._total:
            return ""
        return duration((time.monotonic() - self._start) / done * (self._total - done))

    def _show(self, job: Job) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=self._done + sum(self._parts.values()),
                description=f"{self._finished}/{self._count} {job.name}",
                left=f"{self.left()} left" if self.left() else "",
            )


@contextlib.contextmanager
def reporter(jobs: Sequence[Job]) -> Iterator[Reporter]:
    """A reporter for the block, with a bar where the standard error is a terminal."""
    if not sys.stderr.isatty():
        yield Reporter(jobs)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    columns.append(TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Reporter(jobs, bar)


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(50), duration(3000), duration(9000)
        ('50 s', '50 min', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
