"""The grid: which arms are trained how, on which seeds, in which order, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .training import Run

EPOCHS = 20
LONG_EPOCHS = 3 * EPOCHS
SEEDS = 5
FEW_SEEDS = 3

MAIN = ("plain", "plain-size", "dcn", "dcnv2")
CONTROLS = ("plain-time", "dilated", "transformer", "modulation", "dcnv2-groups", "dcnv4")

# Seconds of one core for one epoch of 4,000 digits, measured on an AMD EPYC; what another machine
# takes is known after its first runs.
SECONDS_PER_EPOCH = {
    "plain": 3.0,
    "plain-size": 4.0,
    "plain-time": 5.6,
    "dilated": 3.6,
    "transformer": 4.2,
    "modulation": 4.6,
    "dcn": 4.8,
    "dcnv2": 5.4,
    "dcnv2-groups": 9.7,
    "dcnv4": 4.8,
    "branch": 4.2,
    "norm": 3.0,
}


@dataclass(frozen=True)
class Part:
    """Runs that answer one question.

    Args:
        title: the question.
        training: of all its runs, one of :data:`~.training.TRAININGS`.
        arms: with the number of seeds of each.
        epochs: of all its runs.
        wait: by how many rounds it comes later than the main arms; a round has one seed.
    """

    title: str
    training: str
    arms: dict[str, int]
    epochs: int = EPOCHS
    wait: float = 0.0


PARTS = {
    "scratch": Part(
        "trained on transformed digits from scratch",
        "scratch",
        dict.fromkeys(MAIN, SEEDS) | dict.fromkeys(CONTROLS, FEW_SEEDS),
    ),
    "upright": Part(
        "trained upright, tested transformed",
        "upright",
        dict.fromkeys(("plain", "dcn", "dcnv2"), SEEDS),
    ),
    "frozen": Part(
        "kernels frozen, only the added part trained",
        "frozen",
        dict.fromkeys(("dcn", "dcnv2"), SEEDS)
        | dict.fromkeys(("branch", "norm", "transformer"), FEW_SEEDS),
    ),
    "long": Part(
        "from scratch, three times as long",
        "scratch",
        dict.fromkeys(MAIN, FEW_SEEDS),
        epochs=LONG_EPOCHS,
        wait=3.0,
    ),
}


@dataclass(frozen=True)
class Choice:
    """What of the grid is wanted.

    Args:
        parts: names of :data:`PARTS`.
        arms: of these alone; None for all.
        seeds: for every arm; None for the published numbers.
        quick: one seed, a tenth of the epochs: a look at whether all works, no evidence.
    """

    parts: Sequence[str] = tuple(PARTS)
    arms: Sequence[str] | None = None
    seeds: int | None = None
    quick: bool = False


def runs(choice: Choice) -> list[tuple[str, Run]]:
    """The runs with the names of their parts, in the order in which they are worth most.

    The main arms of one seed come first; a run comes after the one that it starts from.
    """
    found: list[tuple[float, str, Run]] = []
    for name in choice.parts:
        part = PARTS[name]
        epochs = max(1, part.epochs // 10) if choice.quick else part.epochs
        for arm, seeds in part.arms.items():
            if choice.arms is not None and arm not in choice.arms:
                continue
            wait = part.wait + 1.5 * (arm in CONTROLS)
            for seed in range(1 if choice.quick else choice.seeds or seeds):
                found.append((seed + wait, name, Run(part.training, arm, epochs, seed)))
    found += [
        (place, "upright", run.base)
        for place, _, run in found
        if run.base is not None and run.base not in [other for _, _, other in found]
    ]
    found.sort(key=lambda each: (each[0], each[2].base is not None))
    return list({run: (name, run) for _, name, run in found}.values())


def seconds(run: Run) -> float:
    """What a run takes of one core, about: its epochs, and tests that take as long as two."""
    part = 0.4 if run.arm == "norm" else 1.0
    return SECONDS_PER_EPOCH[run.arm] * (part * run.epochs + 2)
