"""Errors that mean that a CUDA device is short of memory."""

import contextlib

import torch

# What torch, cuBLAS and cuDNN say then.
_SHORT = ("out of memory", "STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
# What they say then and otherwise: of torch before 2.13 the cause is lost on its way through the
# compiled operators, and libraries that cannot be set up do not say why.
_UNCLEAR = (
    *("torch >= 2.13 says why", "API call failed"),
    *("STATUS_NOT_INITIALIZED", "STATUS_INTERNAL_ERROR"),
)
# Less than what cuBLAS and cuDNN take to be set up.
_LITTLE = 512 * 2**20

# By this, programs that go on with less know the error: mmdet's AvoidOOM, for example.
_BEGINNING = "CUDA out of memory. "


def is_short(error: Exception, device: torch.device) -> bool:
    """Whether an error of a call on the device says that its memory is short.

    It then says nothing of what was called. Where the error may mean that or something else, the
    device is asked how much is free.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(part in text for part in _SHORT):
        return True
    return any(part in text for part in _UNCLEAR) and _free(device) < _LITTLE


def _free(device: torch.device) -> float:
    """Bytes of memory that nobody has taken; infinitely many where the device does not tell."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError, AssertionError):
            return torch.cuda.mem_get_info(device)[0]
    return float("inf")


def as_torch_has_it(error: RuntimeError, device: torch.device) -> RuntimeError:
    """The error as torch's own operators would raise it: of another class if memory is short.

    An error of a compiled operator loses its class on the way to Python.
    """
    if device.type != "cuda" or not is_short(error, device):
        return error
    text = str(error)
    return torch.OutOfMemoryError(text if _BEGINNING in text else _BEGINNING + text)
