"""Start of a tool in several processes, for tools/dist_train.sh and tools/dist_test.sh.

What torch.distributed.run does, with the tool's exit status, and without a traceback of its own
after what the tool has said. Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
"""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.engine import launch

# isort: split
import argparse
import os
import subprocess
import sys
from pathlib import Path


def processes(text: str) -> str:
    if text not in ("auto", "cpu", "gpu") and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "processes",
        type=processes,
        metavar="GPUS",
        help="processes on this machine; gpu, cpu and auto count what it has",
    )
    parser.add_argument("tool", type=Path, help="such as tools/train.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the tool")
    args = parser.parse_args()
    # A mistake is said at once, and not by every process.
    command = [sys.executable, args.tool, *args.arguments, "--launcher", "pytorch"]
    checked = subprocess.run([*command, "--arguments-only"], check=False)
    if checked.returncode != 0:
        sys.exit(checked.returncode)
    return args


def main(args: argparse.Namespace) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = {
        "--nnodes": os.environ.get("NNODES", "1"),
        "--node-rank": os.environ.get("NODE_RANK", "0"),
        "--master-addr": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "--master-port": os.environ.get("PORT", "29500"),
        "--nproc-per-node": args.processes,
    }
    command = [text for option in options.items() for text in option]
    try:
        run.main([*command, str(args.tool), *args.arguments, "--launcher", "pytorch"])
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


if __name__ == "__main__":
    launch.run(main, parse_args, needs_toolbox=False)
