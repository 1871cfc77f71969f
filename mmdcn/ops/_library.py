"""The compiled libraries, and the loading of their operators into ``torch.ops.mmdcn``."""

from pathlib import Path

import torch

from mmdcn.errors import LibraryError

from ._after_import import constant_to_the_compiler

FOLDER = Path(__file__).resolve().parent.parent
CPU_LIBRARY = FOLDER / "_cpu.abi3.so"
CUDA_LIBRARY = FOLDER / "_cuda.abi3.so"

REBUILD = "run `pip install .` in mmdcn's source folder, inside the environment that has torch"


CUDA_PROBLEM: str | None = None  # why the CUDA library was found and did not load, if so


def load() -> None:
    """Register the operators, or raise a LibraryError that names the fix if none were built.

    A CUDA library that does not load is no error: :mod:`mmdcn.ops._devices` says what computes
    instead. Whether there is a GPU is not asked here, as a process that has asked cannot fork.
    """
    global CUDA_PROBLEM
    if not CPU_LIBRARY.is_file():
        raise LibraryError(
            f"mmdcn's operators are not compiled: {CPU_LIBRARY} is missing. "
            f"To build them, {REBUILD}."
        )
    try:
        torch.ops.load_library(str(CPU_LIBRARY))
    except OSError as error:
        raise LibraryError(
            f"mmdcn's compiled library {CPU_LIBRARY} does not load under torch "
            f"{torch.__version__} (mmdcn needs torch >= 2.10 and a wheel for this platform): "
            f"{error}. To build it for this machine, {REBUILD}."
        ) from error
    if CUDA_LIBRARY.is_file() and torch.version.cuda is not None:
        try:
            torch.ops.load_library(str(CUDA_LIBRARY))
        except OSError as error:
            CUDA_PROBLEM = str(error)


@constant_to_the_compiler
def cuda_is_loaded() -> bool:
    """Whether the operators have kernels for CUDA tensors in this process."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("mmdcn::deform_conv2d", "CUDA")
