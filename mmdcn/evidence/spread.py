"""Means over seeds with their intervals, and differences that are taken seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# The 97.5 % quantile of Student's t, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T_LARGE = 2.228


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: of the values.
        half_width: of the 95 % interval around it, by Student's t; None for a single value.
        count: number of values.

    Example:
        >>> print(Estimate.of([1.0, 2.0, 3.0]))
        2.0 ± 2.5
        >>> print(Estimate.of([1.5]))
        1.5
    """

    mean: float
    half_width: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value for each seed, of which there is at least one."""
        count = len(values)
        if count == 1:
            return cls(values[0], None, 1)
        quantile = _T[count - 2] if count - 2 < len(_T) else _T_LARGE
        half_width = quantile * statistics.stdev(values) / math.sqrt(count)
        return cls(statistics.mean(values), half_width, count)

    @property
    def low(self) -> float:
        return self.mean - (math.inf if self.half_width is None else self.half_width)

    @property
    def high(self) -> float:
        return self.mean + (math.inf if self.half_width is None else self.half_width)

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, and 0 otherwise."""
        return (self.low > 0) - (self.high < 0)

    def __str__(self) -> str:
        return self.text()

    def text(self, signed: bool = False) -> str:
        """The mean and half of the interval's width, to one decimal."""
        rounded = round(self.mean, 1) + 0.0  # not -0.0
        mean = f"{rounded:+.1f}" if signed else f"{rounded:.1f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.1f}"


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """The estimate of `first` less `second`, over the seeds that both have; None without any.

    Example:
        >>> print(paired({0: 2.0, 1: 4.0, 2: 9.0}, {0: 1.0, 1: 3.0}))
        1.0 ± 0.0
    """
    differences = [value - second[seed] for seed, value in first.items() if seed in second]
    return Estimate.of(differences) if differences else None
