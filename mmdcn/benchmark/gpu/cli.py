"""The arguments of `tools/gpu_check.py`, which are read before torch is imported."""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mmdcn import files

from .processes import die_with_parent, turn_termination_into_an_exception
from .sections import PART_SECONDS, PARTS, SECTIONS, of_part
from .settings import Settings

# A section that would have less is left out.
_LEAST_SECONDS = 5


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.py",
        description="Check and time the installed mmdcn on this machine's GPU. Each part ends by "
        f"itself within {PART_SECONDS} seconds, and writes gpu_check_PART.json and .md after every "
        "case.",
    )
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: a rehearsal, through everything in tiny sizes (default: cuda)",
    )
    parser.add_argument(
        "--sections",
        type=lambda names: names.split(","),
        help=f"some of these, with commas between: {', '.join(SECTIONS)}",
    )
    parser.add_argument(
        "--tests", type=Path, help="a folder that has mmdcn's `tests` and pyproject.toml"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="WHEEL",
        help="another wheel of mmdcn, or a folder that has one installed, to be timed too",
    )
    parser.add_argument(
        "--seconds", type=float, default=PART_SECONDS, help="for all (default: %(default)s)"
    )
    parser.add_argument("--faults", type=json.loads, default={}, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    unknown = set(args.sections or ()) - set(of_part(args.part))
    if unknown:
        parser.error(
            f"argument --sections: expected some of {', '.join(of_part(args.part))}, "
            f"got {', '.join(sorted(unknown))}"
        )
    args.parser = parser
    return args


def main(arguments: list[str] | None = None) -> int:
    return check(parse_args(arguments))


def check(args: argparse.Namespace) -> int:
    """Check and time as the arguments say; the exit status."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error("argument --device: torch sees no CUDA device here; cpu is a rehearsal")
    files.check_folder(args.out, "--out")
    die_with_parent()
    turn_termination_into_an_exception()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            device=args.device,
            folder=folder,
            tests=None if args.tests is None else str(args.tests.resolve()),
            beside=None if args.beside is None else str(_folder_of(args.beside, Path(folder))),
            faults=args.faults,
        )
        with _report_of(args) as (found, changed):
            run(settings, args, found, changed)
    print((args.out / f"gpu_check_{args.part}.md").read_text())
    bad = [n for n, s in found["sections"].items() if s["status"] in ("failed", "incomplete")]
    if bad:
        print(f"gpu_check: {', '.join(bad)}: failed or incomplete", file=sys.stderr)
    return 1 if bad else 0


def run(settings: Settings, args: argparse.Namespace, found: dict, changed: Callable) -> None:
    """Run the sections that are asked for, as far as the time goes."""
    from . import parent

    deadline = time.monotonic() + args.seconds
    log = args.out / f"gpu_check_{args.part}.log"
    log.unlink(missing_ok=True)
    for name, section in of_part(args.part).items():
        if args.sections and name not in args.sections:
            continue
        seconds = min(section.seconds, deadline - time.monotonic())
        if seconds < _LEAST_SECONDS:
            entry = {"status": "incomplete", "seconds": 0.0, "total": None, "cases": []}
            found["sections"][name] = entry | {"error": "no time was left"}
            changed()
            continue
        print(f"gpu_check: {name} ...", end=" ", file=sys.stderr, flush=True)

        def update(entry: dict, name: str = name) -> None:
            found["sections"][name] = entry
            changed()

        entry = parent.run_section(name, settings, seconds, log, update)
        print(f"{entry['status']} ({entry['seconds']:.0f} s)", file=sys.stderr, flush=True)
    found["complete"] = True
    changed()


@contextlib.contextmanager
def _report_of(args: argparse.Namespace) -> Iterator[tuple[dict, Callable[[], None]]]:
    """The report, and what writes it: as JSON and as Markdown, each whole or not at all."""
    from . import report

    found = {"part": args.part, "device": args.device, "complete": False, "sections": {}}
    path = args.out / f"gpu_check_{args.part}"

    def changed() -> None:
        files.write(path.with_suffix(".json"), json.dumps(found, indent=1) + "\n")
        files.write(path.with_suffix(".md"), report.markdown(found))

    changed()
    yield found, changed


def _folder_of(wheel: Path, scratch: Path) -> Path:
    """A folder that has the wheel's mmdcn."""
    if wheel.is_dir():
        return wheel.resolve()
    folder = scratch / "beside"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", folder, wheel], check=True)
    return folder
