"""``sampling.h`` and what is built on it against its corners of one sample."""

import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture
def run_check(compile_host):
    """Compiles and runs one of the programs check_*.cpp, and fails where it finds anything."""

    def run(name: str, *flags: str) -> None:
        program = compile_host(HERE / f"{name}.cpp", "_".join([name, *flags]), *flags)
        result = subprocess.run([program], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:]

    return run


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_arrays_are_corners_bit_by_bit(run_check, level):
    run_check("check_sampling", level)


def test_weights_of_a_bin_are_the_average_of_its_samples(run_check):
    run_check("check_bin_weights", "-O1")
