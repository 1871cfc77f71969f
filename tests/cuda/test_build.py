"""The CUDA sources compile, without a GPU: no warning, no register spill, no excess of memory."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "mmdcn" / "csrc"
CUDA = CSRC / "cuda"
ARCHITECTURES = ("80", "90")


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc"]
    return next(filter(None, map(shutil.which, candidates)), None)


def built_report(source: Path) -> str:
    """What ptxas said when this folder's build compiled the source, if that tells all.

    Empty unless warnings were errors then, and nothing that was compiled has changed since.
    """
    name = "_".join(source.relative_to(CSRC).with_suffix("").parts)
    for kernels in ROOT.glob(f"build/temp*/{name}.kernels"):
        recipe, included = (kernels.with_suffix(suffix) for suffix in (".command", ".d"))
        if not recipe.is_file() or "all-warnings" not in recipe.read_text():
            continue
        listed = included.read_text().replace("\\\n", " ").partition(":")[2].split()
        made = kernels.stat().st_mtime
        if all((ROOT / path).stat().st_mtime <= made for path in listed):
            return kernels.read_text()
    return ""


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
