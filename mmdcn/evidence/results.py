"""The results of finished runs, by part, arm and seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import runner
from .grid import PARTS
from .jobs import DetectorJob, DigitJob
from .spread import Estimate, paired
from .transforms import ALL, KINDS

#: A transformation at a strength.
Test = tuple[str, float]

#: The columns of the page's tables.
COLUMNS: dict[str, Test] = {
    "upright": ("upright", 0),
    **{kind: (kind, 1.0) for kind in KINDS},
    "all ½": (ALL, 0.5),
    "all": (ALL, 1.0),
    "all 1½": (ALL, 1.5),
}


@dataclass
class Finished:
    """The results of jobs, and the jobs that have none.

    Args:
        by_arm: for each part and arm, the result of each seed.
        missing: the jobs that are not finished.
    """

    by_arm: dict[tuple[str, str], dict[int, dict]] = field(default_factory=dict)
    missing: list[DigitJob | DetectorJob] = field(default_factory=list)

    @classmethod
    def read(cls, jobs: Iterable[DigitJob | DetectorJob], folder: Path) -> Finished:
        """The results of jobs that are finished."""
        found = cls()
        for job in jobs:
            result = runner.read_result(job, folder)
            if result is None:
                found.missing.append(job)
            else:
                key = (job.part, job.run.arm)
                found.by_arm.setdefault(key, {})[job.run.seed] = result
        return found


@dataclass
class Results(Finished):
    """What is known of digits: results as :func:`~.training.train` gives them."""

    def arms(self, part: str) -> list[str]:
        """The arms of a part that have results, in the grid's order."""
        return [arm for arm in PARTS[part].arms if (part, arm) in self.by_arm]

    def all(self) -> list[dict]:
        """Every result with the name of its part."""
        return [
            {"part": part, **result}
            for (part, _), seeds in self.by_arm.items()
            for _, result in sorted(seeds.items())
        ]

    def accuracies(self, part: str, arm: str, test: Test) -> dict[int, float]:
        """The accuracy of each seed in percent; empty where there is none."""
        kind, strength = test
        return {
            seed: result["accuracy"][kind][str(strength)]
            for seed, result in self.by_arm.get((part, arm), {}).items()
        }

    def accuracy(self, part: str, arm: str, test: Test) -> Estimate | None:
        """The mean accuracy over the seeds, in percent; None without any."""
        found = self.accuracies(part, arm, test)
        return Estimate.of(list(found.values())) if found else None

    def difference(
        self, first: tuple[str, str], second: tuple[str, str], test: Test
    ) -> Estimate | None:
        """The accuracy of the first part and arm less that of the second, seed by seed."""
        return paired(self.accuracies(*first, test), self.accuracies(*second, test))

    def means(self, one: tuple[str, str], others: Sequence[tuple[str, str]], test: Test) -> float:
        """The mean accuracy of a part and arm over those of its seeds that the others have too."""
        found = self.accuracies(*one, test)
        common = set(found).intersection(*(self.by_arm[other] for other in others))
        return statistics.mean(found[seed] for seed in common)

    def seeds(self, part: str, arms: Sequence[str]) -> int:
        """The number of seeds that all these arms have."""
        found = [set(self.by_arm.get((part, arm), {})) for arm in arms]
        return len(set.intersection(*found)) if found else 0
