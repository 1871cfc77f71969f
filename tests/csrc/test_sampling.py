"""``sampling.h`` and what is built on it against its corners of one sample."""

import subprocess
from pathlib import Path

import pytest

from tests.cuda.conftest import compile_host

HERE = Path(__file__).parent


def run_check(name: str, folder: Path, *flags: str) -> None:
    program = compile_host(str(HERE / f"{name}.cpp"), folder / name, *flags)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("flags", [["-O0"], ["-O2"]], ids=["O0", "O2"])
def test_arrays_are_corners_bit_by_bit(tmp_path, flags):
    run_check("check_sampling", tmp_path, *flags)


def test_weights_of_a_bin_are_the_average_of_its_samples(tmp_path):
    run_check("check_bin_weights", tmp_path, "-O1")
