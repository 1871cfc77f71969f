"""The self-test: every public operator against the reference, on fixed inputs, on any device."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mmdcn import ops
from mmdcn.ops import reference

# Allowed error relative to the largest element. The reference computes in float64 on the same,
# already rounded inputs, so this is rounding of results and of accumulation only.
TOLERANCE = {
    torch.float32: 2e-5,
    torch.float64: 1e-12,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a public operator: its tensors in float64, and its other arguments."""

    tensors: dict[str, Tensor]
    arguments: dict
    constant: tuple[str, ...] = ()  # the tensors that nothing is differentiated for


def calls() -> dict[str, Call]:
    """A small call of every public operator, by its name; the same numbers in every run."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def eighths(*shape: int) -> Tensor:
        """Multiples of 1/8: no dtype moves a sample across a pixel's border."""
        return (normal(*shape) * 8).round() / 8

    def convolution(*size: int) -> Call:
        rank, samples = len(size), 2 * 3 ** len(size)
        tensors = {
            "input": normal(2, 8, *size),
            "offset": eighths(2, rank * samples, *size),
            "weight": normal(6, 4, *[3] * rank),
            "bias": normal(6),
            "mask": normal(2, samples, *size),
        }
        return Call(tensors, {"padding": 1})

    input, points = normal(2, 7, 6, 8), eighths(2, 7, 6, 2 * 9 * 3)
    aggregation = {"kernel_size": 3, "padding": 1, "group": 2}
    rois = torch.tensor([[0, 1.3, 2.2, 12.9, 9.8], [1, 3.1, 0.6, 8.3, 13.2]], dtype=torch.float64)
    pooled = {"input": normal(2, 8, 7, 8), "rois": rois, "offset": eighths(2, 4, 3, 2)}
    pooling = {"output_size": (3, 2), "spatial_scale": 0.5, "sampling_ratio": 2, "gamma": 0.1}
    return {
        "deform_conv1d": convolution(11),
        "deform_conv2d": convolution(7, 6),
        "deform_conv3d": convolution(3, 5, 4),
        "dcnv3": Call(
            {"input": input, "offset": points[..., :36], "mask": points[..., 36:]}, aggregation
        ),
        "dcnv4": Call({"input": input, "offset_mask": points}, aggregation),
        "deform_roi_pool": Call(pooled, pooling, constant=("rois",)),
    }


def largest_error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a public operator's output and gradients, by the reference in float64.

    Args:
        name: the operator's name in mmdcn.ops.
        device: where the operator is to compute; the reference does on the CPU.
        dtype: of all tensors. float32 is not multiplied in TF32, whatever torch's setting.

    Returns:
        The largest error of each tensor over its largest element; of these, the largest, or NaN.
    """
    with _exact_float32():
        found = errors(name, calls()[name], device, dtype)
    return float(torch.tensor(list(found.values())).max())


def errors(name: str, call: Call, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """The errors of a call's output and gradients, by the reference in float64 on the CPU.

    Args:
        name: the operator's name in mmdcn.ops.
        call: of that operator.
        device: where the operator is to compute.
        dtype: of all tensors, which are rounded to it for the reference too.

    Returns:
        For ``'output'`` and each ``'grad_…'``, the largest error over the largest element (or over
        1, if that is less); NaN where the result has one.
    """
    rounded = {n: t.to(dtype) for n, t in call.tensors.items()}
    exact = _results(getattr(reference, name), call, rounded, torch.device("cpu"), torch.float64)
    actual = _results(getattr(ops, name), call, rounded, device, dtype)
    return {
        n: float((actual[n].double().cpu() - e).abs().max() / e.abs().max().clamp(min=1.0))
        for n, e in exact.items()
    }


def _results(
    function: Callable[..., Tensor],
    call: Call,
    rounded: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The output, and the gradients of its sum with fixed weights."""
    leaves = {
        name: tensor.to(device, dtype).detach().requires_grad_(name not in call.constant)
        for name, tensor in rounded.items()
    }
    output = function(**leaves, **call.arguments)
    # Multiples of 1/8, which every dtype has; no multiple of all of them adds up to zero.
    weights = (torch.arange(output.numel()) % 15 - 5).view(output.shape) / 8
    names = [name for name in leaves if name not in call.constant]
    gradients = torch.autograd.grad(
        output, [leaves[name] for name in names], weights.to(device, dtype)
    )
    found = {f"grad_{name}": gradient for name, gradient in zip(names, gradients)}
    return {"output": output.detach(), **found}


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
