"""Benchmark of mmdcn against its peers on this machine, written as tables."""

import argparse

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.benchmark import cli
from mmdcn.engine import launch


def main(args: argparse.Namespace) -> int:
    from mmdcn import timing

    timing.keep_freed_memory()
    return cli.run(args)


if __name__ == "__main__":
    # The standard output is for the tables.
    launch.run(main, cli.parse_args, log_to_stderr=True)
