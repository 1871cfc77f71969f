"""Benchmark of mmdcn against its peers on this machine: ``python -m mmdcn.benchmark``."""

import argparse

from mmdcn.benchmark import cli
from mmdcn.engine import launch


def main(args: argparse.Namespace) -> int:
    from mmdcn import timing

    timing.keep_freed_memory()
    return cli.run(args)


if __name__ == "__main__":
    # The standard output is for the tables.
    launch.run(main, cli.parse_args, log_to_stderr=True)
