"""Builds the CUDA operators' source for the host."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def compile_host(source: str, target: Path, *flags: str) -> Path:
    cxx = os.environ.get("CXX", "g++").split()
    command = [*cxx, "-std=c++17", *WARNINGS, str(HERE / source), "-o", str(target), *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


@pytest.fixture
def host_check(tmp_path):
    """Builds tests/cuda/host_check.cpp with the given flags and returns its path."""

    def build(*flags: str) -> Path:
        return compile_host("host_check.cpp", tmp_path / "host_check", "-g1", "-pthread", *flags)

    return build


@pytest.fixture(scope="session")
def host_operators(tmp_path_factory):
    """The CUDA operators for CPU tensors: ``torch.ops.mmdcn_host``, with the schemas of ours."""
    import mmdcn.ops  # noqa: F401  (registers the schemas)

    library = compile_host(
        "host_library.cpp",
        tmp_path_factory.mktemp("host_library") / "host.so",
        *("-O2", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch_cpu"),
    )
    definitions = torch.library.Library("mmdcn_host", "DEF")
    for name in ("deform_conv2d", "deform_conv2d_backward"):
        schema = str(getattr(torch.ops.mmdcn, name).default._schema)
        definitions.define(schema.removeprefix("mmdcn::"))
    torch.ops.load_library(str(library))
    yield torch.ops.mmdcn_host
    definitions._destroy()
