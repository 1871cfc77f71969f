"""Trials in processes of their own: how they end, and the simplest one that ends as a failing one.

A trial is an object with `check()`, which raises where something is wrong, `simpler()`, which gives
trials that are one step simpler, `prepare()`, which is called once in each process of trials,
`IMPORTS`, and a repr that, after these, makes it anew.
"""

import dataclasses
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import ClassVar, Protocol

from mmdcn.errors import named_first_line

_FORK = multiprocessing.get_context("fork")
#: For which a trial may run before it counts as one that hangs.
PATIENCE = 120.0


class InvalidTrial(Exception):
    """What is asked for is no valid call."""


class Trial(Protocol):
    IMPORTS: ClassVar[str]

    @staticmethod
    def prepare() -> None: ...

    def check(self) -> None: ...

    def simpler(self) -> Iterator["Trial"]: ...


# --------------------------------------------------------------------------------- in a process


def fault_of(task: Callable[[], str | None], patience: float = PATIENCE) -> str | None:
    """What a task in a process of its own says; how the process died, or that it did not end."""
    receiver, sender = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_report, args=(task, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(patience):
            process.kill()
            return f"no end after {patience:.0f} s"
        try:
            return receiver.recv()
        except EOFError:
            process.join()
            code = process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return f"the process died: {how}"
    finally:
        process.join()
        receiver.close()


def _report(task: Callable[[], str | None], sender) -> None:
    # A terminal interrupts this process too, of which its parent is to tell alone.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sender.send(task())
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # What is to be done at a process's end is its parent's.


def complaint(trial: Trial) -> str | None:
    """What is wrong with a trial's outcome."""
    try:
        trial.check()
    except Exception as error:
        return named_first_line(error)
    return None


# ------------------------------------------------------------------------------------ many trials


class _Listed:
    """The complaints about trials, as a dataset."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: int) -> str | None:
        return complaint(self.trials[index])


def _one_after_another(trials: Sequence[Trial]) -> list[str | None]:
    return [complaint(trial) for trial in trials]


def _several_at_once(trials: Sequence[Trial]) -> list[str | None]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(complaint, trials))


def _in_a_fork_too(trials: Sequence[Trial]) -> list[str | None]:
    """In a process that is forked before the first call here, and here at the same time."""
    receiver, sender = _FORK.Pipe(duplex=False)
    child = _FORK.Process(target=_report, args=(lambda: _one_after_another(trials), sender))
    child.start()
    sender.close()
    here = _one_after_another(trials)
    try:
        there = receiver.recv()
    except EOFError:
        there = ["the forked process died"] * len(trials)
    child.join()
    return [a or b for a, b in zip(here, there)]


def _in_workers_of_a_loader(trials: Sequence[Trial]) -> list[str | None]:
    from torch.utils.data import DataLoader

    loader = DataLoader(_Listed(trials), 8, num_workers=2, collate_fn=list)
    return [said for batch in loader for said in batch]


#: How the trials of a process are run.
WAYS: dict[str, Callable[[Sequence[Trial]], list[str | None]]] = {
    "one after another": _one_after_another,
    "from four threads at once": _several_at_once,
    "in a forked process too": _in_a_fork_too,
    "in a DataLoader's workers": _in_workers_of_a_loader,
}
ALONE, BY_THREADS, *_ = WAYS
#: The ways of a source's processes, by turns: each once, and then the quick ones.
TURNS = (*WAYS, *(ALONE, ALONE, ALONE, BY_THREADS) * 5)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A trial that failed, or several that failed together only."""

    trials: Sequence[Trial]
    way: str
    reason: str

    def __str__(self) -> str:
        """The reason, and a command that shows it again."""
        (*_, last) = self.trials
        lines = [last.IMPORTS, "from tests.fuzz.trials import run_together", ""]
        if len(self.trials) == 1:
            lines = [last.IMPORTS, "", f"{last!r}.check()"]
        else:
            lines += ["trials = [", *(f"    {trial!r}," for trial in self.trials), "]"]
            lines += [f"print(run_together({self.way!r}, trials))"]
        script = "\n".join(lines)
        return f"{self.reason}\n\nTo see it again:\n\npython - <<'END'\n{script}\nEND"


def run_together(way: str, trials: Sequence[Trial]) -> Failure | None:
    """Run trials in one process of their own."""

    def task() -> str | None:
        trials[0].prepare()
        for index, said in enumerate(WAYS[way](trials)):
            if said is not None:
                return f"{index}: {said}"
        return None

    fault = fault_of(task)
    if fault is None:
        return None
    index, separator, said = fault.partition(": ")
    if separator and index.isdigit():
        return Failure([trials[int(index)]], way, said)
    return Failure(trials, way, fault)


def reduced(failure: Failure, seconds: float = 120.0) -> Failure:
    """The simplest failure of its kind that is found: of one trial alone, if that fails too."""
    end = time.monotonic() + seconds
    found = None
    for trial in failure.trials:
        reason = alone(trial)
        if reason is not None:
            found = Failure([trial], ALONE, reason)
            break
    if found is None:
        return failure
    kind = _kind(found.reason)
    simplified = True
    while simplified and time.monotonic() < end:
        simplified = False
        for simpler in found.trials[0].simpler():
            reason = alone(simpler)
            if reason is not None and _kind(reason) == kind:
                found, simplified = Failure([simpler], found.way, reason), True
                break
            if time.monotonic() > end:
                break
    return found


def _kind(reason: str) -> str:
    """The exception, or how the process died: a call that is refused is no simpler wrong result."""
    return reason.partition(":")[0]


def alone(trial: Trial) -> str | None:
    """How the trial fails by itself; None if it does not, or is no valid one."""

    def task() -> str | None:
        trial.prepare()
        try:
            trial.check()
        except InvalidTrial:
            return None
        except Exception as error:
            return named_first_line(error)
        return None

    return fault_of(task)


# ------------------------------------------------------------------------------------------ a run


@dataclasses.dataclass
class Source:
    """What trials of one kind are drawn from.

    Attributes:
        draw: makes a trial.
        turns: how its processes run their trials, one after the other.
        weight: how many processes there are of it for one of another source.
        tried: how many trials there were.
    """

    name: str
    draw: Callable[[Random], Trial]
    turns: tuple[str, ...] = TURNS
    weight: int = 1
    tried: int = 0


def run(
    sources: Sequence[Source],
    seed: int,
    together: int,
    enough: Callable[[], bool],
    say: Callable[[str], None],
) -> Failure | None:
    """Try what the sources give, by turns, until it is enough, or one fails.

    Args:
        seed: with a source's name and a number, it decides everything about a trial.
        together: the trials of one process.
        enough: asked after each process.
        say: given a line of progress.

    Returns:
        The first failure, reduced.
    """
    began = time.monotonic()
    order = [source for source in sources for _ in range(source.weight)]
    for source in itertools.cycle(order):
        if enough():
            return None
        way = source.turns[source.tried // together % len(source.turns)]
        numbers = range(source.tried, source.tried + together)
        trials = [source.draw(Random(f"{seed} {source.name} {n}")) for n in numbers]
        failure = run_together(way, trials)
        if failure is not None:
            say(f"{source.name} {way}: {failure.reason}; looking for the simplest")
            return reduced(failure)
        source.tried += together
        counts = ", ".join(f"{source.name} {source.tried:,}" for source in sources)
        say(f"{time.monotonic() - began:.0f} s: {counts}")


def sources(kind: str) -> list[Source]:
    """What there is to try of a kind: the operators, malformed calls, or checkpoints."""
    module = importlib.import_module(f"tests.fuzz.{kind}")
    return module.sources()
