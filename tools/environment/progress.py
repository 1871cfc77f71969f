"""Progress of a compilation by ninja, read from what pip -v prints, with an estimate."""

import re
import sys
import time
from pathlib import Path

STEP = re.compile(r"\s*\[(\d+)/(\d+)\] ")
TOLD = re.compile(r"Collecting|Building wheel|Successfully|error", re.IGNORECASE)
# The compiler's own lines name files with "error" in them.
COMMAND = re.compile(r"-c \S+\.(cpp|cu) ")


def left(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"about {minutes} min left" if minutes else "less than a minute left"


def main() -> None:
    """usage: pip install -v ... 2>&1 | python progress.py NAME LOG"""
    name, log = sys.argv[1:]
    started = None
    tenth = -1
    terminal = sys.stdout.isatty()
    with Path(log).open("w") as whole:
        for line in sys.stdin:
            whole.write(line)
            step = STEP.match(line)
            if step:
                done, count = map(int, step.groups())
                started = started or (time.monotonic(), done)
                begun, first = started
                rate = (time.monotonic() - begun) / max(1, done - first)
                text = f"    {name}: {done} of {count} files"
                if done > first + 2 and done < count:
                    text += f", {left(rate * (count - done))}"
                if terminal:
                    print(f"\r{text:<70}", end="\n" if done == count else "", flush=True)
                elif 10 * done // count > tenth:
                    tenth = 10 * done // count
                    print(text, flush=True)
            elif TOLD.search(line) and not COMMAND.search(line):
                print(line.rstrip()[:300], flush=True)


if __name__ == "__main__":
    main()
