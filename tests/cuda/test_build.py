"""The CUDA sources compile, without a GPU: no warning, no register spill, no excess of memory."""

import re
import subprocess
from pathlib import Path

import pytest

from .built import CSRC, built, find_nvcc

CUDA = CSRC / "cuda"
ARCHITECTURES = ("80", "90")


def built_report(source: Path) -> str:
    """What ptxas said when this folder's build compiled the source; empty if that is not known."""
    target = built(source)
    return target.with_suffix(".kernels").read_text() if target else ""


def compiled_report(source: Path, target: Path) -> str:
    command = [find_nvcc(), "-std=c++17", "-O3"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    command += ["-c", str(source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
@pytest.mark.parametrize(
    "source", sorted(CUDA.rglob("*.cu")), ids=lambda p: f"{p.parent.name}_{p.stem}"
)
def test_kernels_compile_without_warnings_or_spills(source, tmp_path):
    report = built_report(source)
    if not all(f"for 'sm_{architecture}'" in report for architecture in ARCHITECTURES):
        report = compiled_report(source, tmp_path / "kernels.o")

    for architecture in ARCHITECTURES:
        assert f"for 'sm_{architecture}'" in report
    kernels = report.count("Compiling entry function")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(frames) == kernels > 0
    assert all(frame == ("0", "0") for frame in frames), report
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
    assert max(shared) <= 48 * 1024  # what every GPU has, whatever the problem's size
