"""Times of several calls, taken in turns so that the machine's moods reach all of them alike."""

import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

# A library's idle worker threads may spin for a while and slow whoever runs next. So each call is
# made twice, after this pause: the first time to wake its own threads and warm the caches.
PAUSE_SECONDS = 0.002
# A call that takes this long has its own warm-up inside it.
LONG_SECONDS = 0.5
# GPU cycles of sleep before each timed call, in which the host queues the whole of it (about 2 ms).
HEAD_START_CYCLES = 4_000_000


# parameters of glibc's mallopt()
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it has freed, where its C library is glibc.

    By default some of it goes back to the system, as the state of the heap has it, and comes again
    as fresh pages. These can take as long as a convolution, and hit the calls at random.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@dataclass(frozen=True)
class Budget:
    """The number of samples that each call gets.

    Attributes:
        seconds: of samples, after which a call has enough of them,
        fewest: but not before it has this many; where one takes longer than `seconds`, only 2.
        most: samples that are enough, however quick they are.
    """

    seconds: float = 1.0
    fewest: int = 5
    most: int = 101

    def part(self, parts: int) -> "Budget":
        """One of so many equal parts, rounded up."""
        return Budget(self.seconds / parts, -(-self.fewest // parts), -(-self.most // parts))

    def is_spent(self, samples: list[float]) -> bool:
        """Whether these samples, in milliseconds, are enough."""
        if len(samples) >= self.most:
            return True
        slow = bool(samples) and min(samples) > 1000 * self.seconds
        return len(samples) >= (2 if slow else self.fewest) and sum(samples) >= 1000 * self.seconds


@dataclass(frozen=True)
class Call:
    """A function that is timed.

    Attributes:
        function: takes no arguments.
        threads: torch's number of threads for it; None: as it is.
        prepare: called before, untimed.
    """

    function: Callable[[], object]
    threads: int | None = None
    prepare: Callable[[], object] | None = None


def interleave(
    calls: Mapping[str, Call], device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Time calls in turns, in another order each round.

    Args:
        calls: by name.
        device: where they run.
        budget: for each of them.

    Returns:
        Every sample of each call, in milliseconds.
    """
    take_round = _round_on_cuda if device.type == "cuda" else _round_on_cpu
    if device.type == "cuda":
        for _ in range(2):
            take_round(calls, {})
    shuffle = random.Random(0).sample
    samples: dict[str, list[float]] = {name: [] for name in calls}
    while due := [name for name in calls if not budget.is_spent(samples[name])]:
        names = shuffle(due, len(due))
        for name, milliseconds in take_round({n: calls[n] for n in names}, samples).items():
            samples[name].append(round(milliseconds, 4))
    return samples


def _round_on_cpu(
    calls: Mapping[str, Call], samples: Mapping[str, list[float]]
) -> dict[str, float]:
    threads = torch.get_num_threads()
    taken = {}
    try:
        for name, call in calls.items():
            torch.set_num_threads(call.threads or threads)
            if call.prepare is not None:
                call.prepare()
            time.sleep(PAUSE_SECONDS)
            if not samples.get(name) or min(samples[name]) < 1000 * LONG_SECONDS:
                call.function()
            start = time.perf_counter()
            call.function()
            taken[name] = 1000 * (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return taken


def _round_on_cuda(
    calls: Mapping[str, Call], samples: Mapping[str, list[float]]
) -> dict[str, float]:
    events = {}
    for name, call in calls.items():
        if call.prepare is not None:
            call.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call.function()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize()
    return {name: start.elapsed_time(end) for name, (start, end) in events.items()}


def median(samples: Iterable[float]) -> float:
    """The median, which one disturbed sample does not move."""
    return statistics.median(samples)


#: A median is marked where the quartiles are further apart than this part of it.
SCATTER = 0.2
SCATTER_MARK = "~"


def scatters(lower: float, median: float, upper: float) -> bool:
    """Whether samples of these quartiles scatter so much that their medians do not compare."""
    return upper - lower > SCATTER * median
