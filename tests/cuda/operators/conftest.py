"""Builds the CUDA source of the operators but deform_conv2d for the host."""

from pathlib import Path

import pytest
import torch

from tests.cuda.conftest import TORCH, compile_host

FOLDER = Path(__file__).parent.name


@pytest.fixture
def check(tmp_path):
    """Builds one of the programs check_*.cpp with the given flags and returns its path."""

    def build(source: str, *flags: str) -> Path:
        return compile_host(f"{FOLDER}/{source}", tmp_path / "check", "-g1", "-pthread", *flags)

    return build


@pytest.fixture(scope="session")
def host_operators(tmp_path_factory):
    """The CUDA operators for CPU tensors: ``torch.ops.mmdcn_host_operators``, with our schemas."""
    import mmdcn.ops  # noqa: F401  (registers the schemas)

    library = compile_host(
        f"{FOLDER}/host_library.cpp",
        tmp_path_factory.mktemp("host_library") / "host_operators.so",
        *("-O2", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch_cpu"),
    )
    definitions = torch.library.Library("mmdcn_host_operators", "DEF")
    for operator in ("deform_roi_pool", "deform_aggregate", "deform_conv_nd"):
        for name in (operator, f"{operator}_backward"):
            schema = str(getattr(torch.ops.mmdcn, name).default._schema)
            definitions.define(schema.removeprefix("mmdcn::"))
    torch.ops.load_library(str(library))
    yield torch.ops.mmdcn_host_operators
    definitions._destroy()
