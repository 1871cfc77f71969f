"""Which of torch's operators computes the matrix products of convolutions on a CUDA device.

Our kernels gather columns and scatter their gradients; the products between are torch's (see
``csrc/cuda/deform_conv/product.h``). For each product and arithmetic there are several operators of
torch's that could compute it. The first of :data:`CALLS` that gives the right result is taken,
which a tiny call finds out once for each device; ``matmul`` is always the last, and works wherever
torch does. Should torch refuse the one that was taken for some later tensors, ``matmul`` takes its
place there and then, for good, with a warning.

============  ===========  ======================  =============================================
product       arithmetic   calls, best first       why
============  ===========  ======================  =============================================
output,       float64      matmul
grad_columns  float32      matmul
              float32      cudnn, matmul           where torch's setting for products of matrices
              beside TF32                          allows TF32: cudnn is told not to use it
              tf32         cudnn, matmul           cudnn is told to use TF32 by each call, and
                                                   matmul by a setting that is not the one for
                                                   convolutions
              float16,     cudnn, matmul           cudnn adds up in float32, as in dense
              bfloat16                             convolutions; cuBLAS may add up in half
                                                   precision where it splits a sum
grad_weight   float64      matmul
              float32      matmul
              float32      convolution, matmul     the backward pass of a dense convolution, which
              beside TF32                          follows the setting for those
              tf32         convolution, matmul     likewise
              float16,     matmul_to_float,        one sum over many pixels: float32 all the way,
              bfloat16     matmul                  by an output in float32 (torch >= 2.11), or, in
                                                   matmul, by columns in float32
============  ===========  ======================  =============================================

Which arithmetic it is, and whether cuDNN may be called at all, torch's settings say when the
operator runs (:func:`settings`). Where ``torch.backends.cudnn.enabled`` is False, ``cudnn`` and
``convolution`` give way to ``matmul``, which multiplies float32 as torch is set to multiply
matrices: torch's own convolutions do the same then.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import _memory, reference

_logger = logging.getLogger("mmdcn")

_FORWARD = {
    "float32_beside_tf32": ("cudnn", "matmul"),
    "tf32": ("cudnn", "matmul"),
    "float16": ("cudnn", "matmul"),
    "bfloat16": ("cudnn", "matmul"),
}
#: The calls that could compute each product, where there is a choice, best first.
CALLS = {
    "output": _FORWARD,
    "grad_columns": _FORWARD,
    "grad_weight": {
        "float32_beside_tf32": ("convolution", "matmul"),
        "tf32": ("convolution", "matmul"),
        "float16": ("matmul_to_float", "matmul"),
        "bfloat16": ("matmul_to_float", "matmul"),
    },
}

_OPERATORS = torch.ops.mmdcn  # in tests, what is compiled for the host

# The largest error of a call that is right, relative to the largest element: a few roundings.
_TOLERANCE = {"float32_beside_tf32": 1e-5, "tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
# The results that show whether a product is right: the output, or gradients by their number.
_SHOWN_BY = {"output": None, "grad_columns": (0, 1), "grad_weight": (2,)}


# ---------------------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """What torch's settings say of the products of convolutions on CUDA.

    Attributes:
        tf32: float32 may be multiplied in TF32 in convolutions.
        matmul_tf32: torch does that in products of matrices.
        cudnn: cuDNN may be called.
        deterministic: cuDNN must add in the same order in every run.
    """

    tf32: bool
    matmul_tf32: bool
    cudnn: bool
    deterministic: bool


_imposed = threading.local()


def settings() -> Settings:
    """What torch's settings say now: the operators' kernels on CUDA ask at each call."""
    imposed = getattr(_imposed, "settings", None)
    if imposed is not None:
        return imposed
    backends = torch.backends
    return Settings(
        tf32=backends.cudnn.conv.fp32_precision == "tf32",
        matmul_tf32=backends.cuda.matmul.fp32_precision == "tf32",
        cudnn=backends.cudnn.enabled,
        deterministic=(
            backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        ),
    )


@contextlib.contextmanager
def imposed(settings: Settings | None) -> Iterator[None]:
    """Have the operators that this thread calls take these for torch's settings.

    Args:
        settings: None for what torch's settings are.
    """
    before = getattr(_imposed, "settings", None)
    _imposed.settings = settings
    try:
        yield
    finally:
        _imposed.settings = before


# ------------------------------------------------------------------------------------------ choice


def choose(device: torch.device) -> dict[tuple[str, str], str]:
    """Choose the calls for a device, put them into force, and return what was chosen.

    Args:
        device: a CUDA device with its index, on which our kernels run.

    Returns:
        The call of each product and arithmetic for which there is a choice.

    Raises:
        RuntimeError: memory is short, which says nothing of the calls; products that were not
            tried are by ``matmul``.
    """
    return {
        (product, arithmetic): _first_right(device, product, arithmetic, calls)
        for product, arithmetics in CALLS.items()
        for arithmetic, calls in arithmetics.items()
    }


def chosen(device: torch.device) -> dict[tuple[str, str], str]:
    """The calls that are in force on a device."""
    return {
        (product, arithmetic): _OPERATORS.cuda_product(_number(device), product, arithmetic)
        for product, arithmetics in CALLS.items()
        for arithmetic in arithmetics
    }


def describe(device: torch.device) -> str:
    """The calls that are in force on a device, where there is a choice, in a line for people."""
    products = {product: [] for product in CALLS}
    for (product, arithmetic), call in chosen(device).items():
        products[product].append(f"{arithmetic} by {call}")
    return "; ".join(f"{product}: {', '.join(calls)}" for product, calls in products.items())


def _number(device: torch.device) -> int:
    return -1 if device.type == "cpu" else device.index


def tell_replaced(device: int, product: str, arithmetic: str, call: str, why: str) -> None:
    """Say that torch has refused a call that was right at first, and what computes instead."""
    _logger.warning(
        f"{product} in {arithmetic} on cuda:{device}: by {CALLS[product][arithmetic][-1]} from now "
        f"on, as torch refused {call}: {why.partition(chr(10))[0]}"
    )


def _first_right(device: torch.device, product: str, arithmetic: str, calls: tuple) -> str:
    key = _number(device), product, arithmetic
    for call in calls[:-1]:
        _OPERATORS.set_cuda_product(*key, call)
        try:
            problem = _problem(device, product, arithmetic)
        except BaseException:
            _OPERATORS.set_cuda_product(*key, calls[-1])
            raise
        if problem is None:
            # Of other tensors torch may still refuse it.
            _OPERATORS.set_cuda_product(*key, call, may_be_replaced=True)
            return call
        _logger.info(f"{product} in {arithmetic} on {device}: not by {call}: {problem}")
    _OPERATORS.set_cuda_product(*key, calls[-1])
    return calls[-1]


def _problem(device: torch.device, product: str, arithmetic: str) -> str | None:
    """What is wrong with a product on the device, as it is computed now; None if it is right."""
    try:
        results = _results(device, product, arithmetic)
    except RuntimeError as error:
        if _memory.is_short(error, device):
            raise
        return str(error).partition("\n")[0]
    for actual, expected in results:
        error = ((actual.double().cpu() - expected).abs().max() / expected.abs().max()).item()
        if not error <= _TOLERANCE[arithmetic]:
            return f"its error is {error:.1e}"
    return None


def _results(device: torch.device, product: str, arithmetic: str) -> list[tuple[Tensor, Tensor]]:
    """What a small call that needs the product gives, and what it should give in float64."""
    single = arithmetic in ("tf32", "float32_beside_tf32")
    dtype = torch.float32 if single else getattr(torch, arithmetic)
    generator = torch.Generator().manual_seed(0)
    # Two groups, and sizes that cuDNN and tensor cores like: what they do not like they pad.
    shapes = {
        "input": (2, 32, 9, 8),
        "offset": (2, 18, 9, 8),
        "weight": (16, 16, 3, 3),
        "mask": (2, 9, 9, 8),
    }

    def draw(size) -> Tensor:
        values = torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
        # In steps that no dtype rounds, except where the rounding of TF32 is to be seen.
        exact = arithmetic == "float32_beside_tf32"
        return (values if exact else (values * 8).round() / 8).double()

    exact = {name: draw(size) for name, size in shapes.items()}
    geometry = ([1, 1], [1, 1], [1, 1])
    coordinates = ("offset", "mask")
    ours = {
        name: value.to(device, torch.float32 if name in coordinates else dtype)
        for name, value in exact.items()
    }
    x, offset, weight, mask = ours.values()
    now = Settings(arithmetic == "tf32", arithmetic == "float32_beside_tf32", True, False)
    if product == "output":
        with imposed(now):
            output = _OPERATORS.deform_conv2d(x, offset, weight, None, *geometry, mask)
        return [(output, reference.deform_conv2d(**exact, padding=1))]
    leaves = {name: value.requires_grad_() for name, value in exact.items()}
    with torch.enable_grad():
        output = reference.deform_conv2d(**leaves, padding=1)
        grad_output = draw(output.shape)
        expected = torch.autograd.grad(output, list(leaves.values()), grad_output)
    shown = _SHOWN_BY[product]
    wanted = [i in shown for i in range(4)]
    with imposed(now):
        gradients = _OPERATORS.deform_conv2d_backward(
            grad_output.to(device, dtype), x, offset, weight, *geometry, mask, wanted
        )
    return [(gradients[i], expected[i]) for i in shown]
