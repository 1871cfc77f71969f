"""The arrays of corners in ``sampling.h`` against its corners of one sample."""

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("flags", [["-O0"], ["-O2"]], ids=["O0", "O2"])
def test_arrays_are_corners_bit_by_bit(tmp_path, flags):
    source, program = Path(__file__).with_name("check_sampling.cpp"), tmp_path / "check_sampling"
    command = ["g++", "-std=c++17", *flags, "-Wall", "-Wextra", "-Werror", source, "-o", program]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
