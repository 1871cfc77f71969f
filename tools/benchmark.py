"""Measure mmdcn against its peers on this machine, and write tables of it."""

import contextlib
import sys

# The toolbox logs to what is standard output when it is imported; that is for the tables.
with contextlib.redirect_stdout(sys.stderr):
    from mmdcn import timing
    from mmdcn.benchmark import cli

if __name__ == "__main__":
    timing.keep_freed_memory()
    sys.exit(cli.main())
