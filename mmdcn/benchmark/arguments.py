"""The arguments that all measurements share, and what becomes of a result."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from mmdcn import files
from mmdcn.engine import failures

from . import values

__all__ = ["add_common", "add_timing", "common_settings", "measure", "program", "timing_settings"]


def program() -> str:
    """The command that a user typed; both names are one program."""
    is_tool = Path(sys.argv[0]).name == "benchmark.py"
    return "tools/benchmark.py" if is_tool else "python -m mmdcn.benchmark"


def measure(args: argparse.Namespace, fill: Callable[[dict], None]) -> int:
    """Run a measurement; what is known when it ends, or is interrupted, is printed and written."""
    from . import report, tables

    if args.json is not None:
        files.check_folder(args.json.parent, "--json")
    command = shlex.join([*program().split(), *sys.argv[1:]])
    result = {"command": command}
    interruption = None
    try:
        fill(result)
    except KeyboardInterrupt as error:
        interruption = error
    if result.get("cases"):
        print(tables.text(result))
        if args.json is not None:
            report.write_json(args.json, result)
    if interruption is not None:
        known = len(result.get("cases", []))
        where = f", in {args.json}" if known and args.json is not None else ""
        is_terminated = isinstance(interruption, failures.Terminated)
        said, status = ("terminated", 143) if is_terminated else ("interrupted", 130)
        print(f"{said}; measured so far: {known} cases{where}", file=sys.stderr)
        return status
    return 0


def add_common(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Those of what measures on any device, and memory too."""
    parser.add_argument("--device", type=values.one_of("cpu", "cuda"), default="cpu")
    add_timing(parser, seconds)
    parser.add_argument(
        "--no-memory", action="store_true", help="leave the measurement of memory out"
    )


def add_timing(parser: argparse.ArgumentParser, seconds: float) -> None:
    """Those of every measurement."""
    parser.add_argument(
        "--threads", type=values.number(int, 1), help="of the CPU (default: as many as torch takes)"
    )
    parser.add_argument(
        "--seconds",
        type=values.number(float, 0, exclusive=True),
        default=seconds,
        help="of samples for each call; slow ones get few (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=values.json_file,
        metavar="FILE",
        help="write machine, versions and every sample",
    )
    parser.add_argument(
        "--offset-std",
        type=values.number(float, 0),
        default=2.0,
        help="standard deviation of the offsets in pixels, 0 for none (default: %(default)s)",
    )


def common_settings(args: argparse.Namespace) -> dict:
    """The options that :func:`add_common` added, as the settings of each measurement call it."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error("argument --device: expected cpu, as torch sees no GPU here, got 'cuda'")
    return {
        "device": torch.device(args.device),
        "measure_memory": not args.no_memory,
        **timing_settings(args),
    }


def timing_settings(args: argparse.Namespace) -> dict:
    """The options that :func:`add_timing` added."""
    from mmdcn import timing

    cores = os.cpu_count() or 1
    if args.threads is not None and args.threads > cores:
        args.parser.error(
            f"argument --threads: expected at most the {cores} cores of this machine, "
            f"got {args.threads}"
        )
    return {
        "offset_std": args.offset_std,
        "threads": args.threads,
        "budget": timing.Budget(seconds=args.seconds),
    }
