"""The machinery of random trials: how processes end, reductions, and what a failure prints."""

import dataclasses
import os
import signal
import time
from random import Random
from typing import ClassVar

import pytest

from tests.fuzz import trials
from tests.fuzz.trials import ALONE, WAYS, Failure, Source, fault_of, reduced, run, run_together


@dataclasses.dataclass(frozen=True)
class Number:
    """Fails from a number on, in a way."""

    value: int
    fails_from: int = 7
    ends: str = "raises"

    IMPORTS: ClassVar[str] = "from tests.fuzz.test_trials import Number"

    @staticmethod
    def prepare() -> None:
        """Nothing is needed."""

    def check(self) -> None:
        if self.value < self.fails_from:
            return
        if self.ends == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.ends == "hangs":
            time.sleep(60)
        raise AssertionError(f"{self.value} is too much\nof all")

    def simpler(self):
        if self.value > 0:
            yield dataclasses.replace(self, value=self.value // 2)
            yield dataclasses.replace(self, value=self.value - 1)


def test_what_a_process_says():
    assert fault_of(lambda: None) is None
    assert fault_of(lambda: "a fault") == "a fault"
    assert fault_of(lambda: os._exit(3)) == "the process died: exit status 3"
    assert fault_of(Number(9, ends="dies").check) == "the process died: SIGKILL"
    interrupted = fault_of(lambda: signal.raise_signal(signal.SIGINT))
    assert interrupted == "the process died: SIGINT"  # and says nothing of its own
    assert fault_of(Number(9, ends="hangs").check, patience=0.2) == "no end after 0 s"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ends", ["raises", "dies"])
def test_a_failure_is_reduced(way, ends):
    several = [Number(value, ends=ends) for value in (1, 5, 40, 6)]
    assert run_together(way, several[:2]) is None
    failure = reduced(run_together(way, several))
    assert failure.trials == [Number(7, ends=ends)] and failure.way == ALONE
    if ends == "raises":
        assert failure.reason == "AssertionError: 7 is too much"


def test_a_trial_that_fails_in_another_way_is_no_simpler_one(monkeypatch):
    class Refused(Number):
        def check(self) -> None:
            if self.value < 3:
                raise ValueError("expected at least 3")
            super().check()

    assert reduced(run_together(ALONE, [Refused(40)])).trials == [Refused(7)]


def test_a_failure_of_several_together_stays_one(monkeypatch):
    monkeypatch.setitem(trials.WAYS, "together", lambda several: os._exit(1))
    failure = reduced(run_together("together", [Number(1), Number(2)]))
    assert failure.reason == "the process died: exit status 1" and len(failure.trials) == 2
    assert "run_together('together', trials)" in str(failure)


def test_a_failure_prints_a_program_that_shows_it(capfd):
    program = str(Failure([Number(8)], ALONE, "a reason")).split("<<'END'\n")[1].split("END")[0]
    with pytest.raises(AssertionError, match="8 is too much"):
        exec(program)


def test_a_seed_decides_everything():
    lines, drawn = [], []

    def draw(random: Random) -> Number:
        drawn.append(random.randint(0, 5))
        return Number(drawn[-1])

    for _ in range(2):
        source = Source("numbers", draw)
        assert run([source], 3, 10, lambda s=source: s.tried >= 40, lines.append) is None
        assert source.tried == 40
    assert drawn[:40] == drawn[40:] and len(set(drawn)) > 1
    assert lines[3].endswith("numbers 40")
