"""The arrays of corners in ``sampling.h`` against its corners of one sample."""

import subprocess
from pathlib import Path

import pytest

from tests.cuda.conftest import compile_host

SOURCE = Path(__file__).with_name("check_sampling.cpp")


@pytest.mark.parametrize("flags", [["-O0"], ["-O2"]], ids=["O0", "O2"])
def test_arrays_are_corners_bit_by_bit(tmp_path, flags):
    program = compile_host(str(SOURCE), tmp_path / "check_sampling", *flags)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]
