"""A progress bar on a terminal, and a line for each step elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Step = TypeVar("Step")


def track(steps: Iterable[tuple[str, Step]]) -> Iterator[Step]:
    """Give each step, while its name stands on standard error."""
    steps = list(steps)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=len(steps), file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
            for name, step in steps:
                bar.set_description_str(name)
                yield step
                bar.update()
        return
    for number, (name, step) in enumerate(steps, 1):
        print(f"[{number}/{len(steps)}] {name}", file=sys.stderr, flush=True)
        yield step
