"""The sections of both parts, in order, with their limits."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from .settings import Settings

#: Seconds for a part, all its sections together.
PART_SECONDS = 540
PARTS = ("correct", "fast")


@dataclass(frozen=True)
class Case:
    """What is run, recorded, and lost alone, should it break.

    Attributes:
        name: of its own in its section.
        run: gives what is to be in the report, or raises.
    """

    name: str
    run: Callable[[], dict]


class Wrong(Exception):
    """Results that are wrong.

    Attributes:
        findings: what is wrong, a sentence each.
        result: what the case found all the same.
    """

    def __init__(self, findings: list[str], result: dict) -> None:
        super().__init__("; ".join(findings[:5]))
        self.findings, self.result = findings, result


class NotRun(Exception):
    """A case that this machine has not what is needed for."""


@dataclass(frozen=True)
class Section:
    """A list of cases that share a process, as long as that lives.

    Attributes:
        part: ``'correct'`` or ``'fast'``; None: both.
        cases: module and function, in this package, that lists the cases.
        seconds: for all of them, after which the rest is left out.
        case_seconds: for one of them, after which it is stopped and given up.
    """

    part: str | None
    cases: str
    seconds: float
    case_seconds: float = 30

    def list_cases(self, settings: Settings) -> list[Case]:
        module, _, function = self.cases.partition(".")
        return getattr(importlib.import_module(f".{module}", __package__), function)(settings)


SECTIONS: dict[str, Section] = {
    "environment": Section(None, "programs.environment", 30),
    "smoke": Section("correct", "smoke.variants", 50),
    "products": Section("correct", "accuracy.candidates", 40),
    "accumulation": Section("correct", "accuracy.accumulation", 30),
    "random problems": Section("correct", "smoke.random_problems", 60),
    "self-test": Section("correct", "programs.self_test", 40, 40),
    "tests": Section("correct", "programs.tests", 230, 150),
    "sanitizers": Section("correct", "programs.sanitizers", 100, 60),
    "ceilings": Section("fast", "ceilings.cases", 25),
    "convolution": Section("fast", "timed.rows", 180),
    "passes": Section("fast", "timed.passes", 45),
    "product calls": Section("fast", "sweeps.products", 20),
    "offsets": Section("fast", "sweeps.offsets", 25),
    "chunks": Section("fast", "sweeps.chunks", 25),
    "other operators": Section("fast", "sweeps.other_operators", 30),
    "detector": Section("fast", "detector.cases", 80, 60),
    "counters": Section("fast", "programs.counters", 95, 60),
    "beside": Section("fast", "programs.beside", 45),
}


def of_part(part: str) -> dict[str, Section]:
    """The sections of a part, in order."""
    return {n: s for n, s in SECTIONS.items() if s.part in (part, None)}
