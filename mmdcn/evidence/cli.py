"""The arguments of `tools/evidence.py`, which are read before torch is imported."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path

from mmdcn import files
from mmdcn.benchmark.values import number, one_of, several
from mmdcn.errors import InputError

DETECTORS = ("detectors", "detectors-long")
PARTS = ("scratch", "upright", "frozen", "long", *DETECTORS, "layers", "cost")
ARMS = (
    *("plain", "plain-size", "plain-time", "dilated", "transformer", "modulation"),
    *("dcn", "dcnv2", "dcnv2-groups", "dcnv4", "branch", "norm"),
)
WORK_DIR, OUT = Path("work_dirs/evidence"), Path("docs/evidence")
QUICK_WORK_DIR = Path("work_dirs/evidence-quick")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure what deformable layers do under geometric transformation, against "
        "plain ones and controls, and write a report. Each finished run is kept: the same command "
        "goes on after an interruption.",
    )
    add = parser.add_argument
    add(
        "--parts",
        type=several(one_of(*PARTS)),
        default=list(PARTS),
        metavar="PART,…",
        help=f"of {', '.join(PARTS)} (default: all)",
    )
    add(
        "--arms",
        type=several(one_of(*ARMS)),
        metavar="ARM,…",
        help=f"of {', '.join(ARMS)} (default: all)",
    )
    add("--seeds", type=number(int, 1), help="of every arm (default: 5 of the main arms, 3 else)")
    add(
        "--quick",
        action="store_true",
        help="one seed, a tenth of the epochs: minutes, to see it work; no evidence",
    )
    add(
        "--workers",
        type=number(int, 1),
        help="runs side by side, of one thread each (default: as many as there are cores)",
    )
    add("--work-dir", type=Path, help=f"of the runs (default: {WORK_DIR}, or {QUICK_WORK_DIR})")
    add(
        "--out",
        type=Path,
        metavar="NAME",
        help=f"writes NAME.md, and JSON and pictures into NAME/ (default: {OUT}; with --quick, in "
        "--work-dir)",
    )
    add(
        "--reuse",
        type=Path,
        metavar="RUNS.json",
        help=f"takes runs of the same settings over from there, such as {OUT / 'runs.json'}",
    )
    add("--digits", type=Path, metavar="FOLDER", help="that keeps the digits (default: ~/.cache)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print the runs and what they cost, and end"
    )
    what.add_argument(
        "--report-only", action="store_true", help="write the report of the runs that are finished"
    )
    args = parser.parse_args(arguments)
    if args.work_dir is None:
        args.work_dir = QUICK_WORK_DIR if args.quick else WORK_DIR
    if args.out is None:
        args.out = args.work_dir / "evidence" if args.quick else OUT
    return args


def run(args: argparse.Namespace) -> None:
    """Do what the arguments say.

    Raises:
        InputError: see :mod:`~.runner`, :mod:`~.published` and :mod:`~.digits`; or nothing is
            chosen.
    """
    from mmdcn import machine
    from mmdcn.engine import work_folder

    from . import digits, grid, layers, progress, published, report, runner
    from .jobs import DetectorJob, detector_jobs, digit_jobs, plan

    parts = [part for part in args.parts if part in grid.PARTS]
    choice = grid.Choice(parts, args.arms, args.seeds, args.quick)
    jobs = [*digit_jobs(choice, args.digits)]
    jobs += detector_jobs(args.parts, args.arms, args.seeds, args.quick)
    if not jobs and {*parts, *DETECTORS}.intersection(args.parts):
        raise InputError(f"--arms: none of {', '.join(args.arms)} is in {', '.join(args.parts)}")
    workers = args.workers or machine.cores()
    everything = digit_jobs(grid.Choice(seeds=args.seeds, quick=args.quick), args.digits)
    detectors = detector_jobs(DETECTORS, None, args.seeds, args.quick)
    if args.dry_run:
        print(*plan(jobs, runner.unfinished(jobs, args.work_dir), workers), sep="\n")
        return
    files.check_folder(args.work_dir, "--work-dir")
    files.check_folder(args.out.parent, "--out")
    with work_folder.lock(args.work_dir, "benchmark"):
        if args.reuse is not None:
            count = published.take_over(args.reuse, [*everything, *detectors], args.work_dir)
            print(f"{count} runs taken over from {args.reuse}")
        due = runner.unfinished(jobs, args.work_dir)
        if due and not args.report_only:
            digits.load(args.digits)  # before anything is begun
            seeds = [job.run.seed for job in due if isinstance(job, DetectorJob)]
            if seeds:
                from .detectors import make_data  # which imports the toolbox

                make_data(args.work_dir, max(seeds) + 1, progress=True)
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers
            with progress.reporter(due) as told:
                runner.run(due, args.work_dir, workers, told)
        cost = _cost(args)
        looked, pictures = None, {}
        if "layers" in args.parts and not args.quick:
            known = digits.load(args.digits)
            looked = layers.measure(args.work_dir, known)
            pictures = layers.figures(args.work_dir, known)
        written = report.write(
            everything,
            args.work_dir,
            args.out,
            detectors=detectors,
            cost=cost,
            looked=looked,
            pictures=pictures,
            quick=args.quick,
        )
    print(*written, sep="\n")
    sys.stdout.flush()


def _cost(args: argparse.Namespace) -> dict | None:
    """The costs of the arms, measured unless they are known; None where they are not wanted."""
    from . import cost

    path = args.work_dir / cost.FILE
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = json.loads(path.read_text())
        if found["run"] == cost.settings():
            return found
    if args.report_only or "cost" not in args.parts:
        return None
    print("times of all arms, in turns", file=sys.stderr, flush=True)
    found = cost.measure(0.2 if args.quick else 2.0)
    files.write(path, json.dumps(found, indent=1) + "\n")
    return found
