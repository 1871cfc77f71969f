"""Work in threads, and its interruption."""

import contextlib
import random
import signal
import threading
import time

import pytest

from mmdcn.datasets.threads import in_threads


def test_results_come_in_order():
    def slow_if_even(number: int) -> int:
        time.sleep(0.002 * (number % 2 == 0))
        return number

    assert list(in_threads(slow_if_even, 30)) == list(range(30))
    assert list(in_threads(slow_if_even, 0)) == []


def test_what_the_function_raises():
    def fail(number: int) -> int:
        return 1 // (number - 7)

    with pytest.raises(ZeroDivisionError):
        list(in_threads(fail, 10**9))


def test_an_interruption_ends_all_threads():
    """Whenever it comes: as an exception of the handler of a signal."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before, threads = signal.signal(signal.SIGALRM, interrupt), threading.active_count()
    generator = random.Random(0)
    try:
        for _ in range(300):
            interrupted = True
            try:
                with contextlib.closing(in_threads(lambda number: number, 10**9)) as results:
                    signal.setitimer(signal.ITIMER_REAL, generator.uniform(1e-5, 3e-3))
                    for _ in results:
                        pass
                    interrupted = False
            except KeyboardInterrupt:
                pass
            assert interrupted
            deadline = time.monotonic() + 5
            while threading.active_count() > threads:
                assert time.monotonic() < deadline
                time.sleep(0.001)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
