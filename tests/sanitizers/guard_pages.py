"""Calls of every public function with all of their memory between pages that nobody may touch.

A program for a process in which guard_pages.cpp was preloaded; test_guard_pages.py has it run. The
calls are those that `make fuzz` draws: each is made once as usual and once between such pages, of
which both must give the same bits.
"""

import argparse
import ctypes
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import ClassVar

import torch

from tests import instruction_sets
from tests.fuzz import operators, trials

ALLOCATOR = ctypes.CDLL(None)


@contextmanager
def guarded(at_end: bool):
    """What is allocated lies against the page behind it, or against the one before it."""
    ALLOCATOR.guard_start(int(at_end))
    try:
        yield
    finally:
        ALLOCATOR.guard_stop()


@dataclasses.dataclass(frozen=True)
class Guarded:
    """A call, and the instruction set that computes it in a process that has not computed yet."""

    trial: operators.Trial
    capability: str
    at_end: bool

    IMPORTS: ClassVar[str] = "from tests.sanitizers.guard_pages import *"

    @staticmethod
    def prepare() -> None:
        """Nothing is needed."""

    def check(self) -> None:
        os.environ["MMDCN_CPU_CAPABILITY"] = self.capability
        function, usual = self.trial.problem.function, None
        for threads in dict.fromkeys(self.trial.threads):
            torch.set_num_threads(1)
            usual = usual or self.trial.results(
                function, self.trial.tensors(), self.trial.grad_output()
            )
            with guarded(self.at_end):
                # Torch computes with one thread what the call is made of: it is not what is tried.
                tensors, grad = self.trial.tensors(), self.trial.grad_output()
                torch.set_num_threads(threads)
                results = self.trial.results(function, tensors, grad)
            for name, value in usual.items():
                torch.testing.assert_close(
                    results[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: other bits"
                )
        assert torch.ops.mmdcn.cpu_capability() == self.capability

    def simpler(self) -> Iterator["Guarded"]:
        for trial in self.trial.simpler():
            yield dataclasses.replace(self, trial=trial)


def beyond(at_end: bool) -> str | None:
    """Read one element beyond a tensor; the process is to end."""
    with guarded(at_end):
        tensor = torch.zeros(5)
    before = ALLOCATOR.guard_count()
    assert before > 0, "no tensor lies between guard pages"
    index = 5 if at_end else -1
    return str((ctypes.c_float * 1).from_address(tensor.data_ptr() + 4 * index)[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=5, help="calls of each function")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for at_end in (True, False):
        said = trials.fault_of(lambda at_end=at_end: beyond(at_end))
        assert said == "the process died: SIGSEGV", f"a read beyond a tensor: {said}"
    tried = 0
    best = trials.fault_of(torch.ops.mmdcn.cpu_capability)
    for capability in instruction_sets.up_to(best):
        for at_end in (True, False):
            calls = [
                Guarded(operators.draw(name, Random(f"{args.seed} {name} {n}")), capability, at_end)
                for name in operators.DRAWS
                for n in range(args.trials)
            ]
            failure = trials.run_together(trials.ALONE, calls)
            if failure is not None:
                print(trials.reduced(failure))
                return 1
            tried += len(calls)
    print(f"no failure in {tried:,} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
