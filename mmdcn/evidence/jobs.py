"""Runs on digits as jobs for :mod:`~.runner`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from . import digits, grid, training


@dataclass(frozen=True)
class DigitJob:
    """A run on digits.

    Args:
        part: the name of its part of the grid.
        run: what is trained.
        cache: the folder that keeps the digits; None for the user's cache.
    """

    part: str
    run: training.Run
    cache: Path | None = None

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def seconds(self) -> float:
        return grid.seconds(self.run)

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.run.base.name,) if self.run.base is not None else ()

    def settings(self) -> dict:
        return self.run.settings()

    def execute(self, folder: Path, tell: training.Tell) -> dict:
        return training.train(self.run, _digits(self.cache), folder, tell)


_digits = functools.cache(digits.load)


def digit_jobs(choice: grid.Choice, cache: Path | None = None) -> list[DigitJob]:
    """The jobs of what is chosen of the grid, in its order."""
    return [DigitJob(part, run, cache) for part, run in grid.runs(choice)]
