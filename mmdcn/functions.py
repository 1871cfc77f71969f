"""The functions of ``mmcv.ops`` and ``mmcv.cnn``, computed by ours.

Each takes the arguments of mmcv's function of the same name, whose place it takes once
:func:`mmdcn.plugin.install` has been called.
"""

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdcn import models, ops

__all__ = ["deform_conv2d", "deform_roi_pool", "fuse_conv_bn", "modulated_deform_conv2d"]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """:func:`mmdcn.ops.deform_conv2d` without a mask, by the arguments of ``mmcv.ops``.

    As with mmcv, everything is computed in the dtype of `offset`. `im2col_step` is ignored.

    Raises:
        ValueError: if `groups` or `deform_groups` contradict the shapes, or `bias` is not False;
            also where :func:`mmdcn.ops.deform_conv2d` does.
    """
    if bias is not False:
        raise ValueError(
            f"bias: expected False, as mmcv's function adds none, got {bias!r}; "
            "mmdcn.ops.deform_conv2d takes a bias tensor"
        )
    _check_groups(input, offset, weight, groups, deform_groups)
    return ops.deform_conv2d(
        input.type_as(offset), offset, weight.type_as(offset), None, stride, padding, dilation
    )


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """:func:`mmdcn.ops.deform_conv2d` with a mask, by the arguments of ``mmcv.ops``.

    As with mmcv, everything is computed in the dtype of `offset`, and `offset` and `mask` may be
    higher and wider than the output. mmcv's kernels then take each image's values from the start
    of its memory, as if laid out for the output's size; models trained on that need the same
    (mmdet's DyHead uses one level's offsets on the next, smaller level).

    Raises:
        ValueError: if `groups` or `deform_groups` contradict the shapes; also where
            :func:`mmdcn.ops.deform_conv2d` does.
    """
    _check_groups(input, offset, weight, groups, deform_groups)
    offset, mask = _fit_to_output(input, offset, mask, weight, stride, padding, dilation)
    return ops.deform_conv2d(
        input.type_as(offset),
        offset,
        weight.type_as(offset),
        None if bias is None else bias.type_as(offset),
        stride,
        padding,
        dilation,
        mask.type_as(offset),
    )


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """:func:`mmdcn.ops.deform_roi_pool`, whose arguments are those of ``mmcv.ops``."""
    return ops.deform_roi_pool(
        input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma
    )


def fuse_conv_bn(module: nn.Module) -> nn.Module:
    """:func:`mmdcn.models.fuse_conv_bn`, whose argument is that of ``mmcv.cnn``."""
    return models.fuse_conv_bn(module)


def _check_groups(
    input: Tensor, offset: Tensor, weight: Tensor, groups: int, deform_groups: int
) -> None:
    """The operator derives the two numbers from the shapes; what is said must agree."""
    if not input.dim() == offset.dim() == weight.dim() == 4:
        return  # The operator's own checks say what is wrong.
    if input.shape[1] != groups * weight.shape[1]:
        raise ValueError(
            f"groups: expected channels of input / weight.shape[1] = {input.shape[1]} / "
            f"{weight.shape[1]}, got {groups}"
        )
    taps = weight.shape[2] * weight.shape[3]
    if offset.shape[1] != 2 * taps * deform_groups:
        raise ValueError(
            f"deform_groups: expected offset.shape[1] / (2 * kernel height * kernel width) = "
            f"{offset.shape[1]} / {2 * taps}, got {deform_groups}"
        )


def _fit_to_output(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: int | tuple[int, int],
    dilation: int | tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """`offset` and `mask` as mmcv's kernels read them where both are larger than the output."""
    if not input.dim() == offset.dim() == mask.dim() == weight.dim() == 4:
        return offset, mask
    # A step of 0 is for the operator to refuse.
    out_h, out_w = (
        (size + 2 * pad - dil * (kernel - 1) - 1) // max(step, 1) + 1
        for size, pad, dil, kernel, step in zip(
            input.shape[2:], _pair(padding), _pair(dilation), weight.shape[2:], _pair(stride)
        )
    )
    height, width = offset.shape[2:]
    larger = (height, width) != (out_h, out_w) and height >= out_h and width >= out_w
    if not larger or mask.shape[2:] != offset.shape[2:] or min(out_h, out_w) < 1:
        return offset, mask
    return tuple(
        values.flatten(1)[:, : values.shape[1] * out_h * out_w].unflatten(1, (-1, out_h, out_w))
        for values in (offset, mask)
    )
