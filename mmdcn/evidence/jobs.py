"""Runs on digits, and detectors on warped shapes, as jobs for :mod:`~.runner`."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdcn.markdown import table

from . import detector_grid, digits, grid, training
from .progress import duration
from .runner import Job


@dataclass(frozen=True)
class _RunJob:
    run: training.Run | detector_grid.DetectorRun

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.run.base.name,) if self.run.base is not None else ()

    def settings(self) -> dict:
        return self.run.settings()


@dataclass(frozen=True)
class DigitJob(_RunJob):
    """A run on digits.

    Args:
        run: what is trained.
        part: the name of its part of the grid.
        cache: the folder that keeps the digits; None for the user's cache.
    """

    run: training.Run
    part: str
    cache: Path | None = None

    @property
    def seconds(self) -> float:
        return grid.seconds(self.run)

    @property
    def length(self) -> str:
        """Of the training, in words."""
        return f"{self.run.epochs} epochs"

    def execute(self, folder: Path, tell: training.Tell) -> dict:
        return training.train(self.run, _digits(self.cache), folder, tell)


_digits = functools.cache(digits.load)


def digit_jobs(choice: grid.Choice, cache: Path | None = None) -> list[DigitJob]:
    """The jobs of what is chosen of the grid, in its order."""
    return [DigitJob(run, part, cache) for part, run in grid.runs(choice)]


@dataclass(frozen=True)
class DetectorJob(_RunJob):
    """A detector on warped shapes, whose images are in the folder of the results.

    Args:
        run: what is trained.
    """

    run: detector_grid.DetectorRun

    @property
    def part(self) -> str:
        return self.run.training

    @property
    def seconds(self) -> float:
        return detector_grid.seconds(self.run)

    @property
    def length(self) -> str:
        """Of the training, in words."""
        return f"{self.run.iterations} iterations"

    def execute(self, folder: Path, tell: training.Tell) -> dict:
        from . import detectors  # which imports the toolbox

        return detectors.train(self.run, folder, tell)


def detector_jobs(
    parts: Sequence[str],
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    quick: bool = False,
) -> list[DetectorJob]:
    """The jobs of those of these parts that are of detectors, see :mod:`~.detector_grid`."""
    return [DetectorJob(run) for run in detector_grid.runs(parts, arms, seeds, quick)]


def plan(jobs: Sequence[DigitJob | DetectorJob], due: Sequence[Job], workers: int) -> list[str]:
    """What is run and what it costs, as lines of Markdown.

    Args:
        jobs: that are chosen.
        due: those that are not finished.
        workers: runs side by side.
    """
    rows = []
    for part in dict.fromkeys(job.part for job in jobs):
        own = [job for job in jobs if job.part == part]
        counts = Counter(job.run.arm for job in own)
        arms = ", ".join(f"{arm} ×{count}" for arm, count in counts.items())
        rows.append([part, arms, own[0].length, len(own), _cores_time(own)])
    rows.append(["all", "", "", len(jobs), _cores_time(jobs)])
    header = ["part", "arms and seeds", "training", "runs", "time of one core"]
    return [
        *table(header, rows, left=3),
        "",
        f"{len(jobs) - len(due)} runs are finished; the other {len(due)} take about "
        f"{duration(sum(job.seconds for job in due) / workers)} with {workers} at a time.",
    ]


def _cores_time(jobs: Sequence[Job]) -> str:
    return duration(sum(job.seconds for job in jobs))
