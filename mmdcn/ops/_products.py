"""Which of torch's operators computes the matrix products of convolutions on a CUDA device.

Our kernels gather columns and scatter their gradients; the products between are torch's (see
``csrc/cuda/deform_conv/product.h``). For each product and arithmetic there are several operators of
torch's that could compute it. The first of :data:`CALLS` that gives the right result is taken,
which a tiny call finds out once for each device; ``matmul`` is always the last, and works wherever
torch does.

============  ==========  ======================  ==============================================
product       arithmetic  calls, best first       why
============  ==========  ======================  ==============================================
output,       float64     matmul
grad_columns  float32     matmul                  where torch's setting for products of matrices
                                                  allows TF32, cudnn is called instead: it is
                                                  told not to use it
              tf32        cudnn, matmul           cudnn is told to use TF32 by each call, and
                                                  matmul by a setting that is not the one for
                                                  convolutions
              float16,    cudnn, matmul           cudnn adds up in float32, as in dense
              bfloat16                            convolutions; cuBLAS may add up in half
                                                  precision where it splits a sum
grad_weight   float64     matmul
              float32     matmul                  where torch's setting for products of matrices
                                                  allows TF32, convolution: the backward pass of a
                                                  dense convolution, which follows the setting for
                                                  those
              tf32        convolution, matmul     likewise
              float16,    matmul_to_float,        one sum over many pixels: float32 all the way,
              bfloat16    matmul                  by an output in float32 (torch >= 2.11), or, in
                                                  matmul, by columns in float32
============  ==========  ======================  ==============================================
"""

import logging

import torch
from torch import Tensor

from . import reference

_logger = logging.getLogger("mmdcn")

_FORWARD = {
    "tf32": ("cudnn", "matmul"),
    "float16": ("cudnn", "matmul"),
    "bfloat16": ("cudnn", "matmul"),
}
#: The calls that could compute each product, where there is a choice, best first.
CALLS = {
    "output": _FORWARD,
    "grad_columns": _FORWARD,
    "grad_weight": {
        "tf32": ("convolution", "matmul"),
        "float16": ("matmul_to_float", "matmul"),
        "bfloat16": ("matmul_to_float", "matmul"),
    },
}

_OPERATORS = torch.ops.mmdcn  # in tests, what is compiled for the host

# The largest error of a call that is right, relative to the largest element: a few roundings.
_TOLERANCE = {"tf32": 4e-3, "float16": 4e-3, "bfloat16": 3e-2}
# The results that show whether a product is right: the output, or gradients by their number.
_SHOWN_BY = {"output": None, "grad_columns": (0, 1), "grad_weight": (2,)}


def choose(device: torch.device) -> dict[tuple[str, str], str]:
    """Choose the calls for a device, put them into force, and return what was chosen.

    Args:
        device: a CUDA device with its index, on which our kernels run.

    Returns:
        The call of each product and arithmetic for which there is a choice.
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


def _first_right(device: torch.device, product: str, arithmetic: str, calls: tuple) -> str:
    for call in calls[:-1]:
        _OPERATORS.set_cuda_product(_number(device), product, arithmetic, call)
        problem = _problem(device, product, arithmetic)
        if problem is None:
            return call
        _logger.info(f"{product} in {arithmetic} on {device}: not by {call}: {problem}")
    _OPERATORS.set_cuda_product(_number(device), product, arithmetic, calls[-1])
    return calls[-1]


def _problem(device: torch.device, product: str, arithmetic: str) -> str | None:
    """What is wrong with a product on the device, as it is computed now; None if it is right."""
    try:
        results = _results(device, product, arithmetic)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    for actual, expected in results:
        error = ((actual.double().cpu() - expected).abs().max() / expected.abs().max()).item()
        if not error <= _TOLERANCE[arithmetic]:
            return f"its error is {error:.1e}"
    return None


def _results(device: torch.device, product: str, arithmetic: str) -> list[tuple[Tensor, Tensor]]:
    """What a small call that needs the product gives, and what it should give in float64."""
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    options = {"allow_tf32": True} if arithmetic == "tf32" else {}
    generator = torch.Generator().manual_seed(0)
    # Two groups, and sizes that cuDNN and tensor cores like: what they do not like they pad.
    shapes = {
        "input": (2, 32, 9, 8),
        "offset": (2, 18, 9, 8),
        "weight": (16, 16, 3, 3),
        "mask": (2, 9, 9, 8),
    }
    exact = {name: torch.randn(size, generator=generator) for name, size in shapes.items()}
    # In steps that no dtype rounds.
    exact = {name: ((value * 8).round() / 8).double() for name, value in exact.items()}
    geometry = ([1, 1], [1, 1], [1, 1])
    coordinates = ("offset", "mask")
    ours = {
        name: value.to(device, torch.float32 if name in coordinates else dtype)
        for name, value in exact.items()
    }
    x, offset, weight, mask = ours.values()
    if product == "output":
        output = _OPERATORS.deform_conv2d(x, offset, weight, None, *geometry, mask, **options)
        return [(output, reference.deform_conv2d(**exact, padding=1))]
    leaves = {name: value.requires_grad_() for name, value in exact.items()}
    with torch.enable_grad():
        output = reference.deform_conv2d(**leaves, padding=1)
        grad_output = ((torch.randn(output.shape, generator=generator) * 8).round() / 8).double()
        expected = torch.autograd.grad(output, list(leaves.values()), grad_output)
    shown = _SHOWN_BY[product]
    wanted = [i in shown for i in range(4)]
    gradients = _OPERATORS.deform_conv2d_backward(
        grad_output.to(device, dtype), x, offset, weight, *geometry, mask, wanted, **options
    )
    return [(gradients[i], expected[i]) for i in shown]
