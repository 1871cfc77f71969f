"""torch's products, each candidate of each: are they right, and do they add up in float32?"""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from mmdcn import self_test
from mmdcn.errors import named_first_line
from mmdcn.ops import _products, deform_conv2d

from .. import cases
from ..implementations import Mmdcn
from .calls import DTYPES, float32_in, small
from .sections import Case, Wrong
from .settings import Settings
from .smoke import product_by, product_in_force, tolerance

# Channels and groups of the problems: what cuDNN likes, several groups, and what it must pad.
_PROBLEMS = (
    ("deform_conv2d", 64, 1),
    ("deform_conv2d", 16, 2),
    ("deform_conv2d", 5, 2),
    ("deform_conv3d", 16, 2),
)
# The largest share of elements that may be further from the exact sum than one rounding.
_MOST_OUTSIDE = 1e-3


def candidates(settings: Settings) -> list[Case]:
    """Every call of every product against the reference, and which of them are in force."""
    found = [Case("calls in force", functools.partial(_in_force, settings))]
    for product, arithmetics in _products.CALLS.items():
        for arithmetic, calls in arithmetics.items():
            for call in calls:
                run = functools.partial(_candidate, settings, product, arithmetic, call)
                found.append(Case(f"{product}, {arithmetic}, {call}", run))
    return found


def _in_force(settings: Settings) -> dict:
    keys = [
        (product, arithmetic) for product, each in _products.CALLS.items() for arithmetic in each
    ]
    return {"calls": {", ".join(key): product_in_force(settings, *key) for key in keys}}


def _candidate(settings: Settings, product: str, arithmetic: str, call: str) -> dict:
    """A call that is in force must be right, and so must the last; the others need not be."""
    dtype = DTYPES.get(arithmetic, torch.float32)
    calls = _products.CALLS[product][arithmetic]
    needed = {calls[-1], product_in_force(settings, product, arithmetic)}
    # Beside TF32, what is left without cuDNN is no better than that.
    inexact = arithmetic == "float32_beside_tf32" and call == calls[-1]
    bound = tolerance("tf32" if inexact else arithmetic)
    errors, problem = [0.0], None
    with float32_in(arithmetic), product_by(settings, product, arithmetic, call):
        for operator, channels, groups in _PROBLEMS[1:2] if settings.tiny else _PROBLEMS:
            try:
                found = self_test.errors(
                    operator, small(operator, channels, groups), settings.target, dtype
                )
            except RuntimeError as error:
                problem = f"{operator}, {groups} groups of {channels}: {named_first_line(error)}"
                break
            errors += found.values()
    worst = float(torch.tensor(errors).max())  # NaN, if there is one
    if problem is None and not worst <= bound:
        problem = f"error {worst:.1e}"
    result = {"right": problem is None, "error": worst, "problem": problem}
    if problem is not None and call in needed:
        raise Wrong([problem], result)
    return result


# ------------------------------------------------------------------------------------ accumulation


def accumulation(settings: Settings) -> list[Case]:
    """Half types against sums of exact products of the same columns, rounded once."""
    shapes = [shape for shape in settings.shapes if shape.name in ("c4", "c5")]
    return [
        Case(
            f"{shape.name}, {dtype}, {product} by {call}",
            functools.partial(_accumulation, settings, replace(shape, dtype=dtype), product, call),
        )
        for shape in shapes
        for dtype in ("float16", "bfloat16")
        for product in ("output", "grad_weight")
        for call in _products.CALLS[product][dtype]
    ]


def _accumulation(settings: Settings, case: cases.Case, product: str, call: str) -> dict:
    in_force = product_in_force(settings, product, case.dtype) in (call, None)
    made = cases.make_tensors(case, settings.target, offset_std=2.0)
    ours = Mmdcn().bind(case, made)
    with product_by(settings, product, case.dtype, call):
        output = ours.train().detach()
    actual = output if product == "output" else ours.leaves["weight"].grad
    share = outside_one_rounding(actual, exact_sums(ours.leaves, ours.grad_output, product))
    result = {"outside_one_rounding": share, "bound": _MOST_OUTSIDE, "in_force": in_force}
    # On the CPU columns are not always rounded to half types, which is better still.
    if in_force and not settings.tiny and not share <= _MOST_OUTSIDE:
        raise Wrong([f"{share:.2%} of the elements are off by more than a rounding"], result)
    return result


def exact_sums(leaves: dict[str, Tensor], grad_output: Tensor, product: str) -> Tensor:
    """A product of half types in float64: of the weight or of `grad_output` with the columns.

    Args:
        leaves: input, offset, weight and mask of a convolution without groups, of stride 1 and
            padded to keep its size.
        grad_output: the gradient of its output.
        product: ``'output'`` or ``'grad_weight'``.

    Returns:
        Tensor of the product's shape.
    """
    weight, dtype = leaves["weight"].detach(), leaves["weight"].dtype
    out_channels, channels, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    # A kernel that picks each channel at each tap gives the columns, which it does not round.
    picks = torch.eye(channels * taps, device=weight.device).view(-1, channels, *kernel)
    x, offset, mask = (leaves[name].detach().float() for name in ("input", "offset", "mask"))
    with torch.no_grad(), float32_in("float32"):
        columns = deform_conv2d(x, offset, picks, padding=kernel[0] // 2, mask=mask)
    columns = columns.to(dtype).double().flatten(2)
    if product == "output":
        sums = weight.double().flatten(1) @ columns
        return sums.view(len(x), out_channels, *offset.shape[2:])
    sums = grad_output.double().flatten(2) @ columns.transpose(1, 2)
    return sums.sum(0).view(weight.shape)


def outside_one_rounding(actual: Tensor, exact: Tensor) -> float:
    """The share of elements that are further from exact sums than one rounding of their dtype.

    Adding up in float32 leaves next to none outside. Adding up in half precision, even of a few
    parts of a sum, leaves many.
    """
    eps = torch.finfo(actual.dtype).eps
    rounding = eps / 2 * torch.exp2(torch.frexp(exact).exponent.double())
    # Where terms cancel, what float32 leaves is more than that; it is of the terms' size.
    allowed = rounding + 1e-4 * exact.square().mean().sqrt()
    return float(((actual.double() - exact).abs() > allowed).double().mean())
