"""Deformable convolution, v1 and v2, over one and three dimensions.

The meaning of the arguments and the checks are those of :mod:`mmdcn.ops.deform_conv`; the
mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``, for any rank. A sequence
is an image of height one, and has the kernels that are tuned for images.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._registration import register
from .deform_conv import _OPERATOR as _OPERATOR_2D
from .deform_conv import check_compiled, deform_conv, empty_output, multiply_adds


def deform_conv1d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int] = 1,
    padding: int | tuple[int] = 0,
    dilation: int | tuple[int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`mmdcn.ops.deform_conv2d` over one dimension, with linear interpolation.

    Args:
        input: features of shape (N, C, L); float32, float64, float16 or bfloat16. N may be 0.
        offset: Δpn in positions, of shape (N, deform_groups · k, Lo): for each offset group, one
            for each tap. In the input's dtype, or in float32 beside half-precision features.
        weight: kernel of shape (Co, C / groups, k), in the input's dtype.
        bias: shape (Co,), in the input's dtype.
        stride, padding, dilation: in positions.
        mask: modulation of shape (N, deform_groups · k, Lo), in the offset's dtype or one that the
            offset may have.

    Returns:
        Tensor of shape (N, Co, Lo) in the input's dtype, where
        ``Lo = (L + 2 · padding - dilation · (k - 1) - 1) // stride + 1``; with the channels of a
        position together in memory where the input has them so, as a transposed (N, L, C) does,
        and contiguous otherwise.

    Samples outside (-1, L), precision, derivatives, errors and what is deterministic are as in
    :func:`mmdcn.ops.deform_conv2d`.

    Example:
        >>> input, weight = torch.randn(2, 8, 50), torch.randn(16, 8, 3)
        >>> deform_conv1d(input, torch.randn(2, 3, 50), weight, padding=1).shape
        torch.Size([2, 16, 50])
    """
    return deform_conv(
        _over_height_one,
        _straight_over_height_one,
        ("length",),
        input,
        offset,
        weight,
        bias,
        stride,
        padding,
        dilation,
        mask,
    )


def _as_number(size: int | Tensor) -> int:
    """A size that a trace is to hold as a constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return int(size)


def _over_height_one(
    input, offset, weight, bias, stride, padding, dilation, mask, operator=_OPERATOR_2D
) -> Tensor:
    """The operator over two dimensions, on a sequence: no offset leads out of its one row."""
    if torch.jit.is_tracing():
        # torch.onnx's older exporter loses the number of channels in the padding.
        batch, channels, length = offset.shape
        still = torch.zeros_like(offset)
        y_and_x = torch.stack([still, offset], 2).reshape(batch, 2 * _as_number(channels), length)
    else:
        y_and_x = F.pad(offset.unsqueeze(2), (0, 0, 1, 0)).flatten(1, 2)
    output = operator(
        input.unsqueeze(2),
        y_and_x.unsqueeze(2),
        weight.unsqueeze(2),
        bias,
        (1, *stride),
        (0, *padding),
        (1, *dilation),
        None if mask is None else mask.unsqueeze(2),
    )
    return output.squeeze(2)


_straight_over_height_one = functools.partial(_over_height_one, operator=_OPERATOR_2D.forward)


def deform_conv3d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] = 0,
    dilation: int | tuple[int, int, int] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`mmdcn.ops.deform_conv2d` over three dimensions, with trilinear interpolation.

    Args:
        input: features of shape (N, C, D, H, W); float32, float64, float16 or bfloat16. N may be 0.
        offset: Δpn in voxels, of shape (N, 3 · deform_groups · kd · kh · kw, Do, Ho, Wo): for each
            offset group and each tap in row-major order, z then y then x. In the input's dtype, or
            in float32 beside half-precision features.
        weight: kernel of shape (Co, C / groups, kd, kh, kw), in the input's dtype.
        bias: shape (Co,), in the input's dtype.
        stride, padding, dilation: one number, or one for each of depth, height and width, in
            voxels.
        mask: modulation of shape (N, deform_groups · kd · kh · kw, Do, Ho, Wo), in the offset's
            dtype or one that the offset may have.

    Returns:
        Tensor of shape (N, Co, Do, Ho, Wo) in the input's dtype, contiguous whatever the input's
        layout, where
        ``Do = (D + 2 · padding - dilation · (kd - 1) - 1) // stride + 1``, and Ho and Wo likewise.

    Samples outside (-1, D) × (-1, H) × (-1, W), precision, derivatives, errors and what is
    deterministic are as in :func:`mmdcn.ops.deform_conv2d`.

    Example:
        >>> input, weight = torch.randn(1, 4, 5, 6, 7), torch.randn(8, 4, 3, 3, 3)
        >>> deform_conv3d(input, torch.randn(1, 81, 5, 6, 7), weight, padding=1).shape
        torch.Size([1, 8, 5, 6, 7])
    """
    return deform_conv(
        _OPERATOR_3D,
        _OPERATOR_3D.forward,
        ("depth", "height", "width"),
        input,
        offset,
        weight,
        bias,
        stride,
        padding,
        dilation,
        mask,
    )


_OPERATOR_3D = register(
    "deform_conv_nd",
    reference=reference.deform_conv_nd,
    public="deform_conv3d",
    check=check_compiled(("depth", "height", "width")),
    output=empty_output(),
    multiply_adds=multiply_adds,
    own_pass="weight",
)
