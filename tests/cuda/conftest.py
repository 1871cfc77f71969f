"""Builds the CUDA operators' source for the host."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
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
def host_library(tmp_path_factory) -> Path:
    """The CUDA operators for CPU tensors."""
    return compile_host(
        "host_library.cpp",
        tmp_path_factory.mktemp("host_library") / "host.so",
        *("-O2", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch_cpu"),
    )


def load_host_operators(library: Path) -> torch.library.Library:
    """``torch.ops.mmdcn_host``, with the schemas of ours, while what is returned lives."""
    import mmdcn.ops  # noqa: F401  (registers the schemas)

    definitions = torch.library.Library("mmdcn_host", "DEF")
    for name in ("deform_conv2d", "deform_conv2d_backward", "cuda_kernels"):
        schema = str(getattr(torch.ops.mmdcn, name).default._schema)
        definitions.define(schema.removeprefix("mmdcn::"))
    torch.ops.load_library(str(library))
    return definitions


@pytest.fixture(scope="session")
def host_operators(host_library):
    definitions = load_host_operators(host_library)
    yield torch.ops.mmdcn_host
    definitions._destroy()


@pytest.fixture(scope="session")
def tensor_cores(host_operators, host_library) -> Callable:
    """``with tensor_cores() as launches``: their kernels are chosen; `launches()` counts them."""
    library = ctypes.CDLL(str(host_library))

    @contextlib.contextmanager
    def chosen() -> Iterator[Callable[[], int]]:
        library.mmdcn_host_use_tensor_cores(1)
        try:
            yield library.mmdcn_host_tensor_core_launches
        finally:
            library.mmdcn_host_use_tensor_cores(0)

    return chosen
