"""Interruptions that wait for a good moment."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Let handlers of SIGINT and SIGTERM wait until they are asked for, or the context ends.

    What a handler raises within a pool of threads can leave a lock locked, for which the threads
    would wait for ever. Signals that have no handler of Python's keep what they do; and nothing
    changes where this is not the main thread, which alone runs handlers.

    Yields:
        A function that runs the handlers that have been waiting, and raises what they raise.

    Example:
        >>> with deferred() as run_handlers:
        ...     run_handlers()
    """
    noted: list[tuple] = []
    former: dict[signal.Signals, Callable] = {}

    def run_handlers() -> None:
        while noted:
            number, frame = noted.pop(0)
            former[number](number, frame)

    if threading.current_thread() is threading.main_thread():
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        former |= {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in former:
            signal.signal(number, lambda *signalled: noted.append(signalled))
        yield run_handlers
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        run_handlers()
