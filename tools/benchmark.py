"""Measure mmdcn against its peers on this machine, and write tables of it."""

import sys

from mmdcn.benchmark import cli

if __name__ == "__main__":
    sys.exit(cli.main())
