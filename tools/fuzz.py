"""Random trials of what must not break: operators, malformed calls and damaged checkpoints."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.engine import launch

# isort: split
import argparse
import os
import secrets
import sys
import time
from pathlib import Path

KINDS = ("operators", "malformed", "checkpoints")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__
        + " Each process of trials is forked from this one, so that a crash ends a trial and no "
        "more. The first failing trial is reduced, and printed as a program; the exit status is "
        "then 1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS, help="what is tried")
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long")
    parser.add_argument("--trials", type=int, help="end before that, after so many of each")
    parser.add_argument("--together", type=int, default=300, help="trials of one process")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="of the functions or files")
    parser.add_argument(
        "--seed", type=int, default=secrets.randbelow(2**31), help="the same seed, the same trials"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    # What is tried, and how, is part of the tests, which are not installed.
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.fuzz import trials

    sources = {source.name: source for source in trials.sources(args.kind)}
    for name in args.only or ():
        if name not in sources:
            sys.exit(f"error: --only: expected one of {', '.join(sources)}, got {name!r}")
    sources = [sources[name] for name in args.only or sources]
    end = time.monotonic() + args.seconds
    print(f"seed {args.seed}", flush=True)

    def enough() -> bool:
        complete = args.trials is not None and all(s.tried >= args.trials for s in sources)
        return complete or time.monotonic() > end

    failure = trials.run(sources, args.seed, args.together, enough, _progress())
    print()
    if failure is not None:
        print(failure)
        return 1
    print(f"no failure in {sum(source.tried for source in sources):,} trials")
    return 0


def _progress():
    """A function that shows a line in the place of the last one, or one each ten seconds."""
    terminal = sys.stdout.isatty()
    shown = 0.0

    def say(line: str) -> None:
        nonlocal shown
        if terminal:
            width = os.get_terminal_size().columns
            print(f"\r\x1b[K{line[: width - 1]}", end="", flush=True)
        elif time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(line, flush=True)

    return say


if __name__ == "__main__":
    launch.run(main, parse_args)
