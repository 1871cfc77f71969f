"""A check of every config that mmdet ships with a deformable operator, and its report."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import launch

# isort: split
import argparse
import sys
import warnings
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table to this file, in Markdown")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("work_dirs/zoo.json"),
        help="what was checked already: an interrupted sweep goes on from there",
    )
    parser.add_argument("--only", default="*/**/*.py", metavar="GLOB", help="of mmdet's configs")
    args = parser.parse_args()
    if args.out is not None:
        files.check_folder(args.out.parent, "--out")
    return args


def main(args: argparse.Namespace) -> None:
    from mmdcn import zoo

    warnings.simplefilter("ignore")
    results, passed_over = [], {}
    for found, checked in zoo.sweep(zoo.find(args.only, passed_over), args.results):
        results.append((found, checked))
        print(f"{found.name}: {checked.problem or 'ok'}", flush=True)
    if not results:
        sys.exit(f"error: --only: no config with a deformable operator matches {args.only!r}")
    failed = [found.name for found, checked in results if checked.problem is not None]
    print(f"{len(results) - len(failed)} of {len(results)}")
    if args.out is not None:
        files.write(args.out, zoo.table(results, passed_over))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    launch.run(
        main, parse_args, when_interrupted="the same command goes on with what is not checked yet"
    )
