"""Runs sections in processes of their own, and survives whatever these do."""

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import programs
from .processes import running
from .sections import SECTIONS, Section
from .settings import Settings
from .worker import DEVICE_LOST

#: Seconds in which a process must have listed its cases: it imports torch, and CUDA starts.
START_SECONDS = 60
# How often to look what a process has written.
_STEP = 0.1
# So many of the cases that end a process are run again alone, each for so many seconds.
_MOST_ALONE = 2
_ALONE_SECONDS = 60

#: What becomes of a case: it may pass or fail, this machine may lack what it needs, and it may be
#: the end of its process, which may leave it without a device, die, or not come to an end.
FATAL = ("device lost", "crashed", "timed out")


@dataclass
class Watched:
    """A section while it runs; `entry` is what the report has of it."""

    name: str
    settings: Settings
    log: Path
    deadline: float
    changed: Callable[[], None]
    entry: dict = field(
        default_factory=lambda: {"status": "running", "seconds": 0.0, "total": None, "cases": []}
    )

    @property
    def section(self) -> Section:
        return SECTIONS[self.name]

    def command(self, records: Path, first: int, count: int = -1) -> list[str | Path]:
        return [
            *(sys.executable, "-m", f"{__package__}.worker"),
            *("--settings", self.settings.to_json(), "--section", self.name),
            *("--records", records, "--first", str(first), "--count", str(count)),
        ]

    def left(self) -> float:
        return self.deadline - time.monotonic()


def run_section(
    name: str, settings: Settings, seconds: float, log: Path, changed: Callable[[dict], None]
) -> dict:
    """Run all cases of a section; one that ends its process is left behind, and the rest goes on.

    Args:
        name: the section's.
        settings: for its cases.
        seconds: for all of them.
        log: a file that gets the output of the processes.
        changed: called with the section's entry in the report, whenever there is more in it.

    Returns:
        The entry.
    """
    began = time.monotonic()
    watched = Watched(name, settings, log, began + seconds, lambda: None)
    entry = watched.entry

    def update() -> None:
        entry["seconds"] = round(time.monotonic() - began, 1)
        changed(entry)

    watched.changed = update
    first: int | None = 0
    while first is not None:
        first = _run_process(watched, first)
    _run_fatal_cases_alone(watched)
    entry["status"] = _status(entry)
    update()
    return entry


def _run_process(watched: Watched, first: int) -> int | None:
    """Run a process from a case on; returns the case that the next is to begin with, if any."""
    entry = watched.entry
    records = watched.settings.file(f"{watched.name} {first}.records")
    records.unlink(missing_ok=True)
    began = case_began = time.monotonic()
    lines, open_case, stopped = 0, None, None
    with (
        watched.log.open("ab") as stream,
        running(watched.command(records, first), stream) as process,
    ):
        while True:
            ended = process.poll() is not None
            new = _read(records)[lines:]
            lines += len(new)
            for line in new:
                case_began = time.monotonic()
                if "cases" in line:
                    entry["total"] = line["cases"]
                elif "started" in line:
                    open_case = {"number": line["started"], "case": line["case"]}
                else:
                    open_case = None
                    entry["cases"].append({"number": line.pop("ended"), **line})
            if new:
                watched.changed()
            if ended:
                break
            now = time.monotonic()
            if watched.left() <= 0:
                stopped = "section"
            elif lines == 0 and now - began > START_SECONDS:
                stopped = "start"
            elif open_case and now - case_began > watched.section.case_seconds:
                stopped = "case"
            if stopped:
                break
            time.sleep(_STEP)
    return _after(watched, process.returncode, open_case, stopped, time.monotonic() - case_began)


def _after(
    watched: Watched, status: int, open_case: dict | None, stopped: str | None, seconds: float
) -> int | None:
    """Say what ended a process, and where the next begins, if there is to be one."""
    entry = watched.entry
    if open_case is not None:
        how = f"the process ended by {_name_of_signal(status)}" if status else "it ended"
        if stopped:
            how = f"not done after {seconds:.0f} s"
        kind = "left out" if stopped == "section" else "timed out" if stopped else "crashed"
        entry["cases"].append({**open_case, "status": kind, "error": how})
    elif stopped:
        entry["error"] = f"stopped: no case began within {START_SECONDS} s"
        if stopped == "section":
            entry["error"] = "no time was left"
    elif status not in (0, DEVICE_LOST):
        entry["error"] = f"its process ended by {_name_of_signal(status)} outside any case"
    watched.changed()
    if "error" in entry or stopped == "section" or (status == 0 and not open_case):
        return None
    following = entry["cases"][-1]["number"] + 1
    return following if following < entry["total"] and watched.left() > 0 else None


def _read(records: Path) -> list[dict]:
    """The complete lines of a file that another process writes."""
    if not records.is_file():
        return []
    return [json.loads(line) for line in records.read_text().splitlines(True) if line[-1] == "\n"]


def _name_of_signal(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _run_fatal_cases_alone(watched: Watched) -> None:
    """Run what ended its process once more, alone, under compute-sanitizer's memcheck."""
    fatal = [case for case in watched.entry["cases"] if case["status"] in FATAL]
    for case in fatal:
        case["memcheck"] = "not run again, as others were before it"
    for case in fatal[:_MOST_ALONE]:
        program = programs.find("compute-sanitizer")
        seconds = min(_ALONE_SECONDS, watched.left())
        if program is None:
            case["memcheck"] = "compute-sanitizer was not found"
        elif seconds < 5:
            case["memcheck"] = "no time was left"
        else:
            case["memcheck"] = _memcheck(watched, program, case["number"], seconds)
        watched.changed()


def _memcheck(watched: Watched, program: str, number: int, seconds: float) -> str:
    records = watched.settings.file(f"{watched.name} {number} alone.records")
    output = watched.settings.file(f"{watched.name} {number} alone.log")
    command = [program, "--tool", "memcheck", *watched.command(records, number, 1)]
    with output.open("wb") as stream, running(command, stream) as process:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_STEP)
        ended = process.poll() is not None
    said = [line for line in output.read_text(errors="replace").splitlines() if line[:3] == "==="]
    return "\n".join([*([] if ended else [f"not done after {seconds:.0f} s"]), *said[:40]])


def _status(entry: dict) -> str:
    statuses = {case["status"] for case in entry["cases"]}
    if "error" in entry or statuses & {"failed", *FATAL}:
        return "failed"
    if entry["total"] is None or len(entry["cases"]) < entry["total"] or "left out" in statuses:
        return "incomplete"
    return "not run" if statuses == {"not run"} else "passed"
