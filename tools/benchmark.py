"""Benchmark of mmdcn against its peers on this machine, written as tables."""

import contextlib
import sys

# The toolbox logs to the standard output of its import, but that is for the tables.
with contextlib.redirect_stdout(sys.stderr):
    from mmdcn import timing
    from mmdcn.benchmark import cli

if __name__ == "__main__":
    timing.keep_freed_memory()
    sys.exit(cli.main())
