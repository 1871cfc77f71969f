"""Work in threads that may be interrupted at any moment."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


def in_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    """``function(0)``, ``function(1)``, … in this order, computed in as many threads as processors.

    An interruption of the caller ends the threads after what each is computing. It may come at any
    instruction of Python: within `concurrent.futures` it can leave a lock locked, for which threads
    then wait for ever. What is shared here is changed by single calls of C.

    Args:
        count: of numbers that the function is called with.

    Raises:
        Exception: what the function raised first.

    Example:
        >>> list(in_threads(lambda number: number * number, 4))
        [0, 1, 4, 9]
    """
    numbers, results = iter(range(count)), SimpleQueue()
    is_over = False

    def work() -> None:
        for number in numbers:
            if is_over:
                break
            try:
                results.put((number, function(number), None))
            except Exception as error:
                results.put((number, None, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(os.cpu_count() or 1)]
    ready: dict[int, T] = {}
    try:
        _start(threads)
        for wanted in range(count):
            while wanted not in ready:
                number, ready[number], error = results.get()
                if error is not None:
                    raise error
            yield ready.pop(wanted)
    finally:
        is_over = True
        for thread in threads:
            if thread.ident is not None:
                thread.join()


def _start(threads: list[threading.Thread]) -> None:
    """Start them while signals wait, as starting one takes a lock of Python's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for thread in threads:
            thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
