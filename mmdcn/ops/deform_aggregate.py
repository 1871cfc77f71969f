"""Grouped deformable aggregation, the one operator of DCNv3 and DCNv4, top to bottom.

The mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``.
"""

import math

import torch
from torch import Tensor

from . import reference
from ._checks import (
    as_int,
    check_channels,
    check_sides,
    check_tensors,
    check_types,
    coordinate_dtype,
    flag,
    is_whole,
    number,
    output_size,
    pair,
)
from ._observers import OBSERVERS, aggregation, tell
from ._registration import (
    autocast_coordinates,
    autocast_features,
    is_transformed,
    register,
)


def dcnv3(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    group: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Deformable convolution v3: each group of channels adds up samples of its own.

    ``Y(p0) = Σ_k m_k · X(p0 + offset_scale · (p_k + Δp_k))`` in each channel of a group: equation
    (2) of InternImage (arXiv 2211.05778) without the weights, which a linear layer applies
    afterwards. p0 is where the middle of the kernel lies. Channels come last, taps column by
    column, and x before y, all as in InternImage.

    A sample with a coordinate that is not finite, or outside (-1, H) × (-1, W), contributes zero
    and has zero gradient. float16 and bfloat16 accumulate in float32. On the CPU the result is the
    same, bit for bit, for any number of threads; on CUDA the gradient of the input is not, and
    raises under ``torch.use_deterministic_algorithms(True)``. On a device that our kernels do not
    serve, the reference computes.

    Args:
        input: features of shape (N, H, W, C); float32, float64, float16 or bfloat16. N may be 0.
        offset: Δp in pixels, of shape (N, Ho, Wo, group · K · 2): for each group and each tap, x
            then y. K is kh · kw, or one less where `remove_center`. In the input's dtype, or in
            float32 beside half-precision features.
        mask: modulation m of shape (N, Ho, Wo, group · K), as the caller has normalised it: in the
            paper by a softmax over the K taps. In a dtype that the offset may have.
        kernel_size: kh and kw.
        stride, padding, dilation: one number, or one for each of height and width, in pixels.
        group: number of groups; C / group consecutive channels share their samples.
        offset_scale: what the kernel and its offsets are multiplied by.
        remove_center: whether the tap in the middle is left out; kh and kw are odd then.

    Returns:
        Tensor of shape (N, Ho, Wo, C) in the input's dtype, where
        ``Ho = (H + 2 · padding - dilation · (kh - 1) - 1) // stride + 1``, and Wo likewise.

    Raises:
        TypeError: an argument is no tensor or number, or has another dtype than it must.
        ValueError: a shape, a device or a number does not fit the others.

    Example:
        >>> offset, mask = torch.randn(1, 8, 8, 2 * 9 * 2), torch.randn(1, 8, 8, 2, 9)
        >>> mask = mask.softmax(-1).flatten(3)
        >>> dcnv3(torch.randn(1, 8, 8, 32), offset, mask, kernel_size=3, padding=1, group=2).shape
        torch.Size([1, 8, 8, 32])
    """
    geometry = _geometry(kernel_size, stride, padding, dilation, offset_scale, remove_center)
    group = as_int(group)
    check_tensors(_DIMENSIONS, input=input, offset=offset, mask=mask)
    (input,) = autocast_features(input)
    offset, mask = autocast_coordinates(input, offset, mask)
    check_types(input, {}, {"offset": offset, "mask": mask})
    taps, out_size = _check_input(input, group, *geometry)
    _check_points("offset", offset, input, out_size, 2 * taps, group)
    _check_points("mask", mask, input, out_size, taps, group)
    return _aggregate(
        input, offset.unflatten(3, (group, -1)), mask.unflatten(3, (group, -1)), geometry
    )


def dcnv4(
    input: Tensor,
    offset_mask: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    group: int = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Deformable convolution v4: as :func:`dcnv3`, with a modulation that nothing bounds.

    Efficient Deformable ConvNets (arXiv 2401.06197), section 3.1: the same sum, without a softmax.
    Offsets and modulations come in one tensor, as in the authors' implementation.

    Args:
        offset_mask: shape (N, Ho, Wo, group · K · 3), or padded to a multiple of 8 channels, of
            which the last are ignored: for each group the offsets of its taps, x then y, then their
            modulations. In the input's dtype, or in float32 beside half-precision features.

    The other arguments, the result and the errors are those of :func:`dcnv3`.

    Example:
        >>> input, offset_mask = torch.randn(1, 8, 8, 32), torch.randn(1, 8, 8, 2 * 9 * 3)
        >>> dcnv4(input, offset_mask, kernel_size=3, padding=1, group=2).shape
        torch.Size([1, 8, 8, 32])
    """
    geometry = _geometry(kernel_size, stride, padding, dilation, offset_scale, remove_center)
    group = as_int(group)
    check_tensors(_DIMENSIONS, input=input, offset_mask=offset_mask)
    (input,) = autocast_features(input)
    (offset_mask,) = autocast_coordinates(input, offset_mask)
    check_types(input, {}, {"offset_mask": offset_mask})
    taps, out_size = _check_input(input, group, *geometry)
    channels = 3 * taps * group
    padded = (channels + 7) // 8 * 8
    # Splits, as their gradients are put together in one pass; those of slices are filled with zeros
    # and added up.
    if offset_mask.shape[3] == padded > channels:
        offset_mask, _ = offset_mask.split([channels, padded - channels], 3)
    _check_points("offset_mask", offset_mask, input, out_size, 3 * taps, group, padded)
    offset, mask = offset_mask.unflatten(3, (group, -1)).split([2 * taps, taps], 4)
    return _aggregate(input, offset, mask, geometry)


def _aggregate(input: Tensor, offset: Tensor, mask: Tensor, geometry: tuple) -> Tensor:
    wide = coordinate_dtype(input.dtype)
    if not torch.compiler.is_dynamo_compiling() and OBSERVERS and not is_transformed():
        tell(aggregation, offset, mask, input.shape[1:3], *geometry)
    return _OPERATOR(input, offset.to(wide), mask.to(wide), *geometry)


# ------------------------------------------------------------------------------------------- checks

_SIDES = ("height", "width")
_DIMENSIONS = dict.fromkeys(("input", "offset", "mask", "offset_mask"), 4)


def _geometry(kernel_size, stride, padding, dilation, offset_scale, remove_center) -> tuple:
    """The arguments for the geometry, in the form that the compiled operator takes."""
    kernel_size = pair("kernel_size", kernel_size, at_least=1)
    stride = pair("stride", stride, at_least=1)
    padding = pair("padding", padding, at_least=0)
    dilation = pair("dilation", dilation, at_least=1)
    offset_scale = number("offset_scale", offset_scale)
    remove_center = flag("remove_center", remove_center)
    if remove_center and (kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0):
        raise ValueError(
            f"kernel_size: expected odd numbers where remove_center, as a kernel of even size has "
            f"no tap in the middle, got {kernel_size}"
        )
    if remove_center and kernel_size == (1, 1):
        raise ValueError("kernel_size: expected more than one tap where remove_center, got (1, 1)")
    return kernel_size, stride, padding, dilation, offset_scale, remove_center


def _check_input(
    input, group, kernel_size, stride, padding, dilation, offset_scale, remove_center
) -> tuple[int, tuple[int, int]]:
    """The number of taps, and the height and width of the output."""
    size, channels = tuple(input.shape[1:3]), input.shape[3]
    check_sides(input, size, _SIDES)
    check_channels(input, channels)
    if not is_whole(group) or group < 1 or channels % group != 0:
        raise ValueError(f"group: expected a divisor of the {channels} channels, got {group!r}")
    out_size = output_size(size, kernel_size, stride, padding, dilation, _SIDES)
    return kernel_size[0] * kernel_size[1] - int(remove_center), out_size


def _check_points(
    name: str,
    tensor: Tensor,
    input: Tensor,
    out_size: tuple[int, int],
    channels: int,
    group: int,
    padded: int | None = None,
) -> None:
    """Check that the tensor has this many channels for each group, at every output position.

    `padded` is the other number of channels that the caller may give, for the message.
    """
    if tensor.shape[3] != channels * group:
        other = "" if padded in (None, channels * group) else f", or {padded} with padding"
        raise ValueError(
            f"{name}: expected {channels * group} channels in the last dimension, {channels} for "
            f"each of {group} groups{other}, got {tensor.shape[3]}"
        )
    expected = (input.shape[0], *out_size, tensor.shape[3])
    if tensor.shape != expected:
        raise ValueError(
            f"{name}: expected shape {expected}, the batch of input and the height and width of "
            f"the output, got {tuple(tensor.shape)}"
        )


def _check_compiled(
    input, offset, mask, kernel_size, stride, padding, dilation, offset_scale, remove_center
) -> None:
    """Check the compiled operator's arguments, whose points have a dimension for the groups."""
    check_tensors({"input": 4, "offset": 5, "mask": 5}, input=input, offset=offset, mask=mask)
    geometry = _geometry(kernel_size, stride, padding, dilation, offset_scale, remove_center)
    group, channels = offset.shape[3], input.shape[3]
    if group < 1 or channels % group != 0:
        raise ValueError(
            f"offset: expected offset.shape[3], the number of groups, to divide the {channels} "
            f"channels of input, got {group}"
        )
    taps, out_size = _check_input(input, group, *geometry)
    for name, tensor, channels in (("offset", offset, 2 * taps), ("mask", mask, taps)):
        expected = (input.shape[0], *out_size, group, channels)
        if tensor.shape != expected:
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


# ------------------------------------------------------------------------------------------- wiring


def _multiply_adds(input, offset, mask, *, output, **_) -> int:
    """Multiplications of one call: for each sample and channel, four corners with their weights.

    The operator computes nothing but the sampling, which therefore counts. In a convolution it is
    left out, because it is small beside the product.
    """
    return 4 * math.prod(output) * mask[-1]


_OPERATOR = register(
    "deform_aggregate",
    reference=reference.deform_aggregate,
    public="dcnv3 or dcnv4",
    check=_check_compiled,
    output=lambda input, offset, **_: input.new_empty((*offset.shape[:3], input.shape[3])),
    multiply_adds=_multiply_adds,
    own_pass="input",
)
