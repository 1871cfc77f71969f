"""The CUDA sources compile, without a GPU: no warning, no register spill, no excess of memory."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[2] / "mmdcn" / "csrc" / "cuda"


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc was not found")
@pytest.mark.parametrize(
    "source", sorted(CUDA.rglob("*.cu")), ids=lambda path: f"{path.parent.name}_{path.stem}"
)
def test_kernels_compile_without_warnings_or_spills(source, tmp_path):
    architectures = ("80", "90")
    command = [find_nvcc(), "-std=c++17", "-O3"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command += ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"]
    command += ["-c", str(source), "-o", str(tmp_path / "kernels.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    report = result.stdout + result.stderr
    assert result.returncode == 0, report

    for architecture in architectures:
        assert f"for 'sm_{architecture}'" in report
    kernels = report.count("Compiling entry function")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(frames) == kernels > 0
    assert all(frame == ("0", "0") for frame in frames), report
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
    assert max(shared) <= 48 * 1024  # what every GPU has, whatever the problem's size
