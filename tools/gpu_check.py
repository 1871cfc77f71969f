"""Checks and timings of the installed mmdcn on this machine's GPU, for tools/gpu_check.sh."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.benchmark.gpu import cli
from mmdcn.engine import launch

if __name__ == "__main__":
    launch.run(cli.check, cli.parse_args)
