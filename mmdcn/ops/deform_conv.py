"""Deformable convolution, v1 and v2: one operator, top to bottom.

The mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``.
"""

import math

import torch
from torch import Tensor

from . import _devices, _memory, reference
from ._checks import (
    HALF_DTYPES,
    check_channels,
    check_sides,
    check_tensors,
    check_types,
    coordinate_dtype,
    listed,
    numbers,
    output_size,
)
from ._observers import OBSERVERS, convolution, tell
from ._registration import (
    PLAIN,
    autocast_coordinates,
    autocast_features,
    is_transformed,
    memory_format,
    register,
)


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """Deformable convolution v1, or v2 where a mask is given.

    Samples the input at ``p = p0 + pn + Δpn`` with bilinear interpolation, for each tap ``pn`` of
    the kernel, multiplies by the modulation and convolves: equations (2)-(4) of Deformable
    Convolutional Networks (arXiv 1703.06211), and equation (1) of Deformable ConvNets v2 (arXiv
    1811.11168). Arguments are those of ``torchvision.ops.deform_conv2d``.

    A sample with a coordinate that is not finite, or outside (-1, H) × (-1, W), contributes zero
    and has zero gradient. float16 and bfloat16 accumulate in float32. On the CPU the result is the
    same, bit for bit, for any number of threads; on CUDA the gradient of the input is the same in
    every run under ``torch.use_deterministic_algorithms(True)`` only: it is then summed in fixed
    point, in 62 bits, which takes longer, and is coarser than float64 for float64.

    Differentiable any number of times, from the second on through the reference, which is slow.
    Within the transformations of ``torch.func`` (``vmap``, ``grad``, ``jvp`` and so on) and in
    forward-mode differentiation, the reference computes everything. On a device that our kernels do
    not serve, mmcv's compute, where mmcv is installed and has some, or else the reference; one
    warning for each device says which and why.

    Args:
        input: features of shape (N, C, H, W); float32, float64, float16 or bfloat16. N may be 0.
            A channels-last input gives a channels-last output.
        offset: Δpn in pixels, of shape (N, 2 · deform_groups · kh · kw, Ho, Wo): for each offset
            group and each tap in row-major order, y then x. In the input's dtype, or in float32
            beside half-precision features. C / deform_groups consecutive channels share a group;
            deform_groups follows from the shape and may be any divisor of C.
        weight: kernel of shape (Co, C / groups, kh, kw), in the input's dtype. groups follows from
            the shape.
        bias: shape (Co,), in the input's dtype.
        stride, padding, dilation: one number, or one for each of height and width, in pixels.
        mask: modulation of shape (N, deform_groups · kh · kw, Ho, Wo), in the offset's dtype or one
            that the offset may have.

    Returns:
        Tensor of shape (N, Co, Ho, Wo) in the input's dtype, where
        ``Ho = (H + 2 · padding - dilation · (kh - 1) - 1) // stride + 1``, and Wo likewise.

    Raises:
        TypeError: an argument is no tensor or number, or has another dtype than it must.
        ValueError: a shape, a device or a number does not fit the others.
        RuntimeError: on CUDA, ``torch.use_deterministic_algorithms(True)`` is set, and what cuBLAS
            needs for it is not; the message says what to set.
        torch.OutOfMemoryError: the memory of a CUDA device is short.

    Example:
        >>> input, weight = torch.randn(1, 8, 32, 32), torch.randn(16, 8, 3, 3)
        >>> offset, mask = torch.randn(1, 18, 32, 32), torch.rand(1, 9, 32, 32)
        >>> deform_conv2d(input, offset, weight, padding=1, mask=mask).shape
        torch.Size([1, 16, 32, 32])
    """
    return deform_conv(
        _OPERATOR,
        _OPERATOR.forward,
        ("height", "width"),
        input,
        offset,
        weight,
        bias,
        stride,
        padding,
        dilation,
        mask,
    )


def deform_conv(
    operator,
    straight,
    sides: tuple[str, ...],
    input,
    offset,
    weight,
    bias,
    stride,
    padding,
    dilation,
    mask,
) -> Tensor:
    """The operator on checked arguments.

    Args:
        operator: takes the compiled operator's arguments, for any device.
        straight: the same, for calls that :func:`_goes_straight` finds to be for our kernels.
        sides: what the dimensions of an image are called.
    """
    rank = len(sides)
    stride = numbers("stride", stride, rank, 1)
    padding = numbers("padding", padding, rank, 0)
    dilation = numbers("dilation", dilation, rank, 1)
    refusal = None
    if _goes_straight(input, offset, weight, bias, mask):
        # The operator itself refuses arguments that do not fit together. The checks that find what
        # is at fault run only after such a refusal, because their time counts for small layers.
        if torch._C._is_any_autocast_enabled():
            input, weight, bias = autocast_features(input, weight, bias)
        arguments = (input, offset, weight, bias, stride, padding, dilation, mask)
        try:
            if torch.is_grad_enabled():
                return straight(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return straight(*arguments)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            refusal = error
    try:
        _check_dimensions(rank, input, offset, weight, bias, mask)
        input, weight, bias = autocast_features(input, weight, bias)
        offset, mask = autocast_coordinates(input, offset, mask)
        check_types(input, {"weight": weight, "bias": bias}, {"offset": offset, "mask": mask})
        _check_shapes(sides, input, offset, weight, bias, stride, padding, dilation, mask)
        if refusal is not None:
            # The arguments are not at fault, so it is an error of the device or of its memory.
            # Another call would give the same, or another one that hides the cause.
            if isinstance(refusal, RuntimeError):
                refusal = _memory.as_torch_has_it(refusal, input.device)
            raise refusal
    finally:
        del refusal  # as it has this frame, and so would keep all tensors until it is collected
    wide = coordinate_dtype(input.dtype)
    mask = None if mask is None else mask.to(wide)
    if not torch.compiler.is_dynamo_compiling() and OBSERVERS and not is_transformed():
        geometry = (input.shape[2:], weight.shape[2:], stride, padding, dilation)
        tell(convolution, offset, mask, *geometry)
    return operator(input, offset.to(wide), weight, bias, stride, padding, dilation, mask)


def _goes_straight(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
) -> bool:
    """Whether a call reaches the compiled operator's kernel directly, with its tensors unchanged.

    The time of this check counts for small layers, and most of it goes to code that other work has
    driven from the caches. It therefore makes only calls that are quick.
    """
    # Observers are told of arguments that have been checked.
    if (
        torch.compiler.is_dynamo_compiling()
        or OBSERVERS
        or not (
            type(input) in PLAIN
            and type(offset) in PLAIN
            and type(weight) in PLAIN
            and (bias is None or type(bias) in PLAIN)
            and (mask is None or type(mask) in PLAIN)
        )
    ):
        return False
    if input.is_cpu:
        on_one_device = (
            offset.is_cpu
            and weight.is_cpu
            and (bias is None or bias.is_cpu)
            and (mask is None or mask.is_cpu)
        )
    else:
        on_one_device = (
            input.is_cuda
            and offset.is_cuda
            and weight.is_cuda
            and (bias is None or bias.is_cuda)
            and (mask is None or mask.is_cuda)
            and _devices.DECIDED.get(input.device, _devices.UNDECIDED).kernels
            # Then there is something to be looked at before the call.
            and not torch.are_deterministic_algorithms_enabled()
        )
    return (
        on_one_device
        # Coordinates in half precision are to be converted.
        and offset.dtype not in HALF_DTYPES
        and (mask is None or mask.dtype not in HALF_DTYPES)
        # Tracers other than Dynamo need no check: their tensors have a type of their own.
        and not is_transformed()
    )


# ------------------------------------------------------------------------------------------- checks


def _check_dimensions(rank, input, offset, weight, bias, mask) -> None:
    check_tensors(
        {"input": 2 + rank, "offset": 2 + rank, "weight": 2 + rank} | {"bias": 1, "mask": 2 + rank},
        optional=("bias", "mask"),
        input=input,
        offset=offset,
        weight=weight,
        bias=bias,
        mask=mask,
    )


def check_compiled(sides: tuple[str, ...]):
    """A function that checks the compiled operator's arguments, for these sides of an image."""

    def check(input, offset, weight, bias, stride, padding, dilation, mask) -> None:
        rank = len(sides)
        _check_dimensions(rank, input, offset, weight, bias, mask)
        stride = numbers("stride", stride, rank, 1)
        padding = numbers("padding", padding, rank, 0)
        dilation = numbers("dilation", dilation, rank, 1)
        _check_shapes(sides, input, offset, weight, bias, stride, padding, dilation, mask)

    return check


def _check_shapes(sides, input, offset, weight, bias, stride, padding, dilation, mask) -> None:
    batch, channels, *size = input.shape
    out_channels, group_channels, *kernel = weight.shape
    taps = math.prod(kernel)
    check_channels(input, channels)
    check_sides(input, size, sides)
    if taps < 1 or group_channels < 1 or out_channels < 1:
        raise ValueError(
            f"weight: expected no dimension of size 0, got shape {tuple(weight.shape)}"
        )
    if channels % group_channels != 0:
        raise ValueError(
            f"weight: weight.shape[1] must divide the {channels} channels of input "
            f"(it is channels / groups), got {group_channels}"
        )
    groups = channels // group_channels
    if out_channels % groups != 0:
        raise ValueError(
            f"weight: weight.shape[0], the number of output channels, must be a multiple of the "
            f"{groups} groups (channels of input / weight.shape[1]), got {out_channels}"
        )
    if bias is not None and bias.shape[0] != out_channels:
        raise ValueError(
            f"bias: expected shape ({out_channels},), one for each output channel, "
            f"got {tuple(bias.shape)}"
        )

    out_size = output_size(size, kernel, stride, padding, dilation, sides)
    _check_coordinates(sides, channels, kernel, (batch, *out_size), offset, mask)


def _check_coordinates(sides, channels, kernel, positions, offset, mask) -> None:
    """Check offset and mask; `positions` are the batch and the size of the output."""
    rank, taps = len(sides), math.prod(kernel)
    per_tap = offset.shape[1] // (rank * taps)
    if offset.shape[1] % (rank * taps) != 0 or per_tap < 1 or channels % per_tap != 0:
        raise ValueError(
            f"offset: offset.shape[1] is not valid: expected {rank} · {_product(kernel)} · "
            f"deform_groups, where deform_groups divides the {channels} channels of input "
            f"({rank * taps} for one group), got {offset.shape[1]}"
        )
    expected = {
        "offset": (offset, (positions[0], offset.shape[1], *positions[1:])),
        "mask": (mask, (positions[0], per_tap * taps, *positions[1:])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if name == "mask" and tensor.shape[1] != shape[1]:
            raise ValueError(
                f"mask: mask.shape[1] is not valid: expected {shape[1]}, {_product(kernel)} "
                f"for each of the {per_tap} offset groups of offset, got {tensor.shape[1]}"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: expected shape {shape}, the batch of input and the {listed(sides)} of "
                f"the output, got {tuple(tensor.shape)}"
            )


def _product(kernel: list[int]) -> str:
    return " · ".join(map(str, kernel))


# ------------------------------------------------------------------------------------------- wiring


def multiply_adds(input, offset, weight, bias, stride, padding, dilation, mask, output) -> int:
    """Multiplications, each with its addition, of one call with tensors of these shapes.

    They are those of equation (2), as for a dense convolution of the same shape. The interpolation
    takes four more for each sample and channel; it is left out, as in published figures.
    """
    batch, out_channels, *size = output
    return batch * out_channels * math.prod(size) * math.prod(weight[1:])


def empty_output(memory_format_of=lambda _: torch.contiguous_format):
    """A function that makes an empty output, for a layout that follows from the input's."""

    def output(input, offset, weight, **_):
        return torch.empty(
            (input.shape[0], weight.shape[0], *offset.shape[2:]),
            dtype=input.dtype,
            device=input.device,
            memory_format=memory_format_of(input),
        )

    return output


_OPERATOR = register(
    "deform_conv2d",
    reference=reference.deform_conv_nd,
    public="deform_conv2d",
    check=check_compiled(("height", "width")),
    output=empty_output(memory_format),
    multiply_adds=multiply_adds,
    own_pass="weight",
    layouts=("input", "offset", "weight", "mask"),
)
