"""The timing of calls, on a clock that the tests turn."""

import platform
from types import SimpleNamespace

import pytest
import torch

from mmdcn import timing
from mmdcn.timing import Budget, Call
from tests.programs import run_python

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes when a call says so."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    clock.sleep = lambda seconds: None
    monkeypatch.setattr(timing, "time", clock)
    return clock


def taking(clock, durations):
    """A call that takes the given seconds, one after the other, the last one from then on."""
    durations = list(durations)

    def call():
        clock.now += durations.pop(0) if len(durations) > 1 else durations[0]

    return call


def test_keeps_every_sample_and_none_of_the_warm_ups(clock):
    # Every second call is the one that counts.
    durations = [0.4, 0.1, 0.4, 0.2, 0.4, 0.3]
    samples = timing.interleave({"a": Call(taking(clock, durations))}, CPU, Budget(10, 3, 3))
    assert samples["a"] == pytest.approx([100.0, 200.0, 300.0])
    assert timing.median(samples["a"]) == pytest.approx(200.0)


@pytest.mark.parametrize(
    "seconds, count",
    [(0.001, 31), (0.125, 8), (0.25, 5), (0.9, 5), (1.5, 2)],
)
def test_slow_calls_get_fewer_samples(clock, seconds, count):
    samples = timing.interleave({"a": Call(taking(clock, [seconds]))}, CPU, Budget(1.0, 5, 31))
    assert len(samples["a"]) == count


def test_parts_of_a_budget_add_up_to_no_less():
    assert Budget(1.0, 5, 31).part(3) == Budget(1 / 3, 2, 11)
    assert Budget(1.0, 5, 31).part(1) == Budget(1.0, 5, 31)


def test_what_is_long_is_not_warmed_up_again(clock):
    called = []
    step = taking(clock, [1.0])
    calls = {"a": Call(lambda: (called.append(1), step()))}
    samples = timing.interleave(calls, CPU, Budget(10, 5, 5))
    assert (len(samples["a"]), len(called)) == (5, 6)


def test_calls_take_turns_in_changing_order(clock):
    order = []
    calls = {
        name: Call(lambda name=name: order.append(name), prepare=lambda: order.append("-"))
        for name in "abc"
    }
    timing.interleave(calls, CPU, Budget(10, 8, 8))
    rounds = ["".join(order[i : i + 9]) for i in range(0, len(order), 9)]
    assert len(rounds) == 8
    assert all(sorted(taken.replace("-", "")) == list("aabbcc") for taken in rounds)
    assert all(taken[1] == taken[2] and taken[0] == "-" for taken in rounds)
    assert len(set(rounds)) > 1


def test_each_call_runs_on_its_own_number_of_threads():
    threads = torch.get_num_threads()
    seen = {"one": set(), "all": set()}
    calls = {
        "one": Call(lambda: seen["one"].add(torch.get_num_threads()), threads=1),
        "all": Call(lambda: seen["all"].add(torch.get_num_threads())),
    }
    timing.interleave(calls, CPU, Budget(10, 3, 3))
    assert seen == {"one": {1}, "all": {threads}}
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    code = """if True:
        import resource, torch
        from mmdcn import timing
        def pages_of_one_more():
            # Each somewhat smaller, so that it fits where the one before was, whatever small things
            # have been put there since.
            for number in range(12):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.ones((64 << 18) - (number << 14))
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        assert pages_of_one_more() > 1000
        timing.keep_freed_memory()
        assert pages_of_one_more() < 100
    """
    run_python("-c", code)
