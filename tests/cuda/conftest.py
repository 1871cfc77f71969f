"""The CUDA operators' source, built for the host."""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmdcn.ops import _devices, _products

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
OPERATORS = ("deform_conv2d", "deform_conv_nd", "deform_aggregate", "deform_roi_pool")
SCHEMAS = [*OPERATORS, *(f"{name}_backward" for name in OPERATORS)]
SCHEMAS += ["cuda_product", "set_cuda_product", "set_cuda_chunk"]


@pytest.fixture
def check_with_sanitizers(compile_host, sanitizers) -> Callable:
    """Runs one of the programs check_*.cpp, and fails where it finds anything."""

    def check(operator: str, problems: int) -> None:
        flags = ("-Og", "-g1", "-pthread", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
        name = f"check_{operator}_{sanitizers.partition(',')[0]}"
        program = compile_host(HERE / f"check_{operator}.cpp", name, *flags)
        runs = [("0", str(problems), "4")]
        if sanitizers != "thread":
            runs.append(("100", "1", "256"))  # the geometry of the GPU's blocks
        for arguments in runs:
            result = subprocess.run(
                [program, *arguments], capture_output=True, text=True, check=False
            )
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]

    return check


@pytest.fixture(params=["address,undefined,float-cast-overflow", "thread"])
def sanitizers(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def host_library(compile_host) -> Path:
    """The CUDA operators for CPU tensors."""
    return compile_host(
        *(HERE / "host_library.cpp", "host_library.so"),
        *("-O1", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-isystem", str(TORCH / "include"), f"-L{TORCH / 'lib'}", "-ltorch_cpu"),
    )


@pytest.fixture(scope="session")
def host_operators(host_library):
    """``torch.ops.mmdcn_host``, with the schemas of ours."""
    import mmdcn.ops  # noqa: F401  (registers the schemas)

    definitions = torch.library.Library("mmdcn_host", "DEF")
    for name in SCHEMAS:
        schema = str(getattr(torch.ops.mmdcn, name).default._schema)
        definitions.define(schema.removeprefix("mmdcn::"))
    torch.ops.load_library(str(host_library))
    yield torch.ops.mmdcn_host
    definitions._destroy()


@pytest.fixture(scope="session")
def set_memory(host_library) -> Callable[[int, int], None]:
    """``set_memory(chunk_bytes, copy_bytes)``: how much a convolution takes at a time."""
    function = ctypes.CDLL(str(host_library)).mmdcn_host_set_memory
    function.argtypes = [ctypes.c_int64, ctypes.c_int64]
    function(3000, 3000)
    return function


# ------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def exact_float32():
    """Float32 is exact in the tests on a GPU, unless they say otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def tf32(exact_float32):
    torch.backends.cudnn.conv.fp32_precision = "tf32"


@pytest.fixture
def deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def product_by():
    """``product_by(product, arithmetic, call)`` has a call compute a product during the test."""
    device = torch.device("cuda", 0)
    # The first call on a device chooses them, which must not come later.
    service = _devices.service(device)
    assert service.kernels, _devices.describe(device, service)
    before = _products.chosen(device)

    def choose(product: str, arithmetic: str, call: str) -> None:
        torch.ops.mmdcn.set_cuda_product(0, product, arithmetic, call)

    yield choose
    for key, call in before.items():
        torch.ops.mmdcn.set_cuda_product(0, *key, call, may_be_replaced=True)


@pytest.fixture
def chunks_of():
    """``chunks_of(size)`` has convolutions work on so many bytes of columns at a time."""
    yield torch.ops.mmdcn.set_cuda_chunk
    torch.ops.mmdcn.set_cuda_chunk(0)
