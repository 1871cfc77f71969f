"""Benchmark of mmdcn against its peers on this machine, written as tables."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.benchmark import cli
from mmdcn.benchmark.__main__ import main
from mmdcn.engine import launch

if __name__ == "__main__":
    # The standard output is for the tables.
    launch.run(main, cli.parse_args, log_to_stderr=True)
