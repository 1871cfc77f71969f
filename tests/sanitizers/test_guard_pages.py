"""No operator touches memory beyond a tensor, or reads what nothing was written to."""

import os
import subprocess
import sys
from pathlib import Path

from tests.programs import REPOSITORY

HERE = Path(__file__).parent


def test_nothing_is_touched_beyond_a_tensor(compile_host):
    """Few calls; MMDCN_GUARDED_CALLS asks for more of each function."""
    flags = ("-O1", "-shared", "-fPIC", "-fvisibility=hidden")
    allocator = compile_host(HERE / "guard_pages.cpp", "guard_pages.so", *flags)
    command = [sys.executable, "-m", "tests.sanitizers.guard_pages"]
    command += ["--trials", os.environ.get("MMDCN_GUARDED_CALLS", "2")]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"LD_PRELOAD": str(allocator), "PYTHONPATH": path}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "no failure in" in done.stdout
