"""The compiled libraries, and the loading of their operators into ``torch.ops.mmdcn``."""

from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent
CPU_LIBRARY = FOLDER / "_cpu.abi3.so"
CUDA_LIBRARY = FOLDER / "_cuda.abi3.so"

REBUILD = "run `pip install .` in mmdcn's source folder, inside the environment that has torch"


def _load(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"mmdcn's compiled library {path} does not load under torch {torch.__version__} "
            f"(mmdcn needs torch >= 2.10 and a wheel for this platform): {error}. "
            f"To build it for this machine, {REBUILD}."
        ) from error


def load() -> None:
    """Register the operators, or raise an ImportError that names the fix if none were built."""
    if not CPU_LIBRARY.is_file():
        raise ImportError(
            f"mmdcn's operators are not compiled: {CPU_LIBRARY} is missing. "
            f"To build them, {REBUILD}."
        )
    _load(CPU_LIBRARY)
    if CUDA_LIBRARY.is_file() and torch.cuda.is_available():
        _load(CUDA_LIBRARY)


@torch.compiler.assume_constant_result
def cuda_is_loaded() -> bool:
    """Whether the operators can run on CUDA tensors in this process."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("mmdcn::deform_conv2d", "CUDA")


def require_kernels_for(device: torch.device) -> None:
    """Raise a RuntimeError that names the fix where no compiled kernel serves the device."""
    if device.type in ("cpu", "meta") or (device.type == "cuda" and cuda_is_loaded()):
        return
    if device.type != "cuda":
        raise RuntimeError(
            f"input is on {device}: mmdcn's operators run on cpu and cuda tensors; move the model "
            "and its inputs to one of these."
        )
    if CUDA_LIBRARY.is_file():
        raise RuntimeError(
            f"input is on {device}, but torch saw no GPU when mmdcn was imported: import mmdcn "
            "where torch.cuda.is_available() is True."
        )
    raise RuntimeError(
        f"input is on {device}, but mmdcn was built without its CUDA library: install a CUDA "
        f"toolkit (nvcc), set CUDA_HOME to its folder, then {REBUILD}."
    )
