"""What computes the operators on a device: our kernels, mmcv's, or the reference.

Our kernels serve the CPU, and every GPU on which they run: they may not have been compiled for its
architecture, its driver may be too old for them, or they may not be there at all. On other devices
mmcv's kernels compute what they can, where mmcv is installed (:mod:`mmdcn.plugin` hands them over
by :func:`offer`), and the reference, which is plain PyTorch, everything else.

Which it is gets decided once for each device, by a small call of the kernels, and never while
somebody traces: to ``torch.compile`` the answer is a constant.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import logging
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from . import _library, _memory, _products
from ._after_import import constant_to_the_compiler
from ._determinism import products_are_refused

_logger = logging.getLogger("mmdcn")

_DRIVER = "libcuda.so.1"
OURS, MMCV, REFERENCE = "mmdcn's kernels", "mmcv's kernels", "the reference"


@dataclasses.dataclass(frozen=True)
class Service:
    """What computes on a device.

    Attributes:
        kernels: whether our kernels do.
        substitutes: the compiled operators that mmcv's kernels compute where ours do not.
        problem: why our kernels do not compute there, and what to do about it; empty if they do.
    """

    kernels: bool
    substitutes: frozenset[str] = frozenset()
    problem: str = ""

    def of(self, operator: str) -> str:
        """What computes the compiled operator of this name."""
        if self.kernels:
            return OURS
        return MMCV if operator in self.substitutes else REFERENCE


#: What was decided. Who counts microseconds looks here for a device, and takes a device that is not
#: there for UNDECIDED, to ask :func:`service` in good time.
DECIDED: dict[torch.device, Service] = {}
UNDECIDED = Service(kernels=False)

# What computes an operator by mmcv's kernels, by the compiled operator's name and arguments.
_offered: dict[str, Callable[..., Tensor | None]] = {}
_served: set[torch.device] = set()  # where our kernels run, if the products are not chosen yet
_lock = threading.Lock()


def offer(operator: str, compute: Callable[..., Tensor | None]) -> None:
    """Hand over mmcv's kernels for a compiled operator, for devices that ours do not serve.

    Args:
        operator: the compiled operator's name.
        compute: takes the compiled operator's arguments; returns None for a call that these kernels
            cannot compute.
    """
    with _lock:
        _offered[operator] = compute
        DECIDED.clear()
        _served.clear()


def substitute(operator: str, *arguments) -> Tensor | None:
    """The operator by mmcv's kernels, or None where they cannot compute this call."""
    return _offered[operator](*arguments)


@constant_to_the_compiler
def server(operator: str, device: torch.device) -> str:
    """What computes the compiled operator of this name on the device: OURS, MMCV or REFERENCE."""
    return service(device).of(operator)


def service(device: torch.device) -> Service:
    """What computes on the device; decided, and logged once, at the first call."""
    decided = DECIDED.get(device)
    if decided is not None:
        return decided
    if device.type in ("cpu", "meta"):
        return DECIDED.setdefault(device, Service(kernels=True))
    if device.type == "cuda" and _is_capturing():
        # Waiting for the device would spoil the graph that is being captured. Whoever captures
        # one has warmed up, normally, and then this was decided before.
        return Service(kernels=_library.cuda_is_loaded())
    if not _exists(device):
        # Then it is a model that somebody traces for another machine, by tensors without values.
        return Service(kernels=True)
    with _lock:
        if device in DECIDED:
            return DECIDED[device]
        if device in _served and products_are_refused():
            return Service(kernels=True)
        service, is_final = _in_a_neutral_state(_decide, device)
        if is_final:
            DECIDED[device] = service
        if is_final:
            level = logging.WARNING if service.problem else logging.INFO
            _logger.log(level, describe(device, service))
        return service


def describe(device: torch.device, service: Service) -> str:
    """What computes on the device, why, and what to do about it if it is not our kernels."""
    if service.kernels:
        return f"mmdcn's kernels compute on {device}"
    by_mmcv = ""
    if service.substitutes:
        by_mmcv = f"mmcv's kernels compute {' and '.join(sorted(service.substitutes))} there, and "
    return (
        f"mmdcn's kernels do not compute on {device}: {service.problem}; until then {by_mmcv}plain "
        f"PyTorch computes {'the rest' if by_mmcv else 'there'}, which is right and slow "
        "(python -m mmdcn.check says more)"
    )


# --------------------------------------------------------------------------------------- decisions


def _in_a_neutral_state(function: Callable, *arguments):
    """What a function returns or raises in a thread of its own.

    Whatever the caller has set for what it calls does not count there: inference mode, gradients,
    autocast, a default device, modes, transformations, hooks on what is saved for the backward
    pass. What is set for the whole process does: the order of additions, for example.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def _decide(device: torch.device) -> tuple[Service, bool]:
    """What computes on the device, and whether that is final."""
    if device not in _served:
        problem = _problem_of_kernels(device)
        if problem is not None:
            substitutes = frozenset(name for name in _offered if _runs(name, device))
            return Service(False, substitutes, problem), True
        _served.add(device)
    return Service(kernels=True), _products_are_chosen(device)


def _products_are_chosen(device: torch.device) -> bool:
    """Choose torch's calls for the products, if that is possible now."""
    if products_are_refused():
        return False
    try:
        _products.choose(device)
    except RuntimeError as error:
        if not _memory.is_short(error, device):
            raise
        _logger.info(f"products on {device} are by matmul for now: {first_line(error)}")
        return False
    return True


def _problem_of_kernels(device: torch.device) -> str | None:
    """Why our kernels do not serve the device, and what to do; None if they do."""
    if device.type != "cuda":
        return "they are for cpu and cuda, so move the model and its inputs to one of these"
    if not _library.cuda_is_loaded():
        return _problem_of_library()
    arguments = _small_calls(device)
    torch.cuda.synchronize(device)  # An error of what ran before is not ours to catch.
    try:
        _run_kernels(arguments)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        if _memory.is_short(error, device):
            raise _memory.as_torch_has_it(error, device) from error
        _clear_error(device)
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{first_line(error)}; for this GPU, set TORCH_CUDA_ARCH_LIST={major}.{minor} and "
            f"CUDA_HOME to a toolkit that its driver knows (CUDA {driver_cuda()} or older), then "
            f"{_library.REBUILD}"
        )
    return None


def _problem_of_library() -> str:
    if _library.CUDA_PROBLEM is not None:
        return (
            f"their library does not load ({_library.CUDA_PROBLEM}); to compile it for this "
            f"machine, {_library.REBUILD}"
        )
    if _library.CUDA_LIBRARY.is_file():
        return (
            f"torch {torch.__version__} is not built for CUDA; install a torch that is, then "
            f"{_library.REBUILD}"
        )
    return (
        "mmdcn was built without its CUDA library; install a CUDA toolkit (nvcc), set CUDA_HOME to "
        f"its folder, then {_library.REBUILD}"
    )


def _small_calls(device: torch.device) -> dict[str, tuple]:
    """Arguments of a small call of some compiled operators, each of which gives a one."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float32, device=device)
    zeros = torch.zeros(1, 2, 1, 1, dtype=torch.float32, device=device)
    rois = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]], dtype=torch.float32, device=device)
    points = zeros.view(1, 1, 1, 1, 2), one.view(1, 1, 1, 1, 1)
    step, none = (1, 1), (0, 0)
    return {
        "deform_aggregate": (one, *points, step, step, none, step, 1.0, False),
        "deform_conv2d": (one, zeros, one, None, step, none, step, None),
        "deform_roi_pool": (one, rois, None, step, 1.0, 1, 0.1, False),
    }


def _run_kernels(arguments: dict[str, tuple]) -> None:
    """One small call, forward and backward, or a RuntimeError."""
    results = [torch.ops.mmdcn.deform_aggregate(*arguments["deform_aggregate"])]
    # The product of a convolution is torch's, which refuses it in some settings on any GPU.
    if not products_are_refused():
        input, offset, weight, _, *geometry, mask = arguments["deform_conv2d"]
        results.append(torch.ops.mmdcn.deform_conv2d(*arguments["deform_conv2d"]))
        grad_input, _, grad_weight, _ = torch.ops.mmdcn.deform_conv2d_backward(
            results[-1], input, offset, weight, *geometry, mask, [True, True, True, False]
        )
        results += [grad_input, grad_weight]
    if any(bool((result != 1).any()) for result in results):
        raise RuntimeError("they compute wrong numbers there")


def _runs(operator: str, device: torch.device) -> bool:
    """Whether mmcv's kernels, too, run on the device and compute the right number."""
    try:
        output = _offered[operator](*_small_calls(device)[operator])
        return output is not None and bool((output == 1).all())
    except Exception as error:  # whatever it is that mmcv raises where it was not compiled for it
        if _memory.is_short(error, device):
            raise
        _clear_error(device)
        return False


def _clear_error(device: torch.device) -> None:
    """Have torch read, and thereby clear, what CUDA keeps of the last error."""
    if device.type != "cuda":
        return
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize(device)


def _exists(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_available()


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def first_line(error: Exception) -> str:
    """The first line of the error's message, as torch's CUDA errors go on with general advice."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def driver_cuda() -> str:
    """The newest CUDA that the driver knows, "12.4" for example."""
    version, status = ctypes.c_int(), None
    with contextlib.suppress(OSError, AttributeError):
        # torch asks the driver, and does not tell.
        status = ctypes.CDLL(_DRIVER).cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return "unknown"
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
