"""Checks and timings of the installed mmdcn on this machine's GPU, for tools/gpu_check.sh."""

import sys

from mmdcn.benchmark.gpu import cli

if __name__ == "__main__":
    sys.exit(cli.main())
