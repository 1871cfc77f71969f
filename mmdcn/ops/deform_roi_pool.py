"""Deformable RoI pooling, also position-sensitive: one operator, top to bottom.

The mathematics is in :mod:`mmdcn.ops.reference`; the kernels are in ``csrc/``.
"""

import math

from torch import Tensor

from . import reference
from ._checks import (
    LONGEST_SIDE,
    as_int,
    check_channels,
    check_sides,
    check_tensors,
    check_types,
    coordinate_dtype,
    flag,
    is_whole,
    number,
    pair,
)
from ._registration import (
    autocast_coordinates,
    is_batched,
    is_transformed,
    register,
)

_DIMENSIONS = {"input": 4, "rois": 2, "offset": 4}
MOST_POINTS = 2**24  # points of a bin along each dimension; float32 counts this far


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    position_sensitive: bool = False,
) -> Tensor:
    """Deformable RoI pooling: RoI Align whose bins are moved by offsets.

    Divides each RoI into kh × kw bins, moves bin (i, j) by ``Δp = gamma · Δp̂ ∘ (w, h)``, where Δp̂
    is its offset and w × h the size of the RoI, and averages the input, sampled with bilinear
    interpolation, over a grid of points in the bin: equation (6) of Deformable Convolutional
    Networks (arXiv 1703.06211, section 2.2), and its PS RoI pooling where `position_sensitive`.
    Arguments and results are those of ``mmcv.ops.deform_roi_pool``.

    A point between -1 and 0, or between the last pixel and one further, reads the border; a point
    that is further outside, or not finite, contributes zero and has zero gradient, and it counts in
    the average all the same. A RoI whose box is inverted is sampled from its end to its start if
    `sampling_ratio` is positive; if it is adaptive, a box that is inverted, empty or NaN gives
    zero. No gradient goes to `rois`.

    float16 and bfloat16 accumulate in float32, and coordinates are float32 beside them. Under
    autocast the input keeps its dtype, and so does the output; `rois` and `offset` may have any.
    On the CPU the result is the same, bit for bit, for any number of threads; on CUDA the gradient
    of the input is not, and raises under ``torch.use_deterministic_algorithms(True)``. On a device
    that our kernels do not serve, mmcv's compute, or the reference.

    Args:
        input: features of shape (N, C, H, W); float32, float64, float16 or bfloat16.
        rois: shape (R, 5): number of the image, then x1, y1, x2, y2 in pixels of the image. In the
            input's dtype, or in float32 beside half-precision features. R may be 0.
        offset: Δp̂ in fractions of the RoI's size, of shape (R, 2 · deform_groups, kh, kw): for each
            offset group x, then y. Co / deform_groups consecutive output channels share a group;
            deform_groups follows from the shape. In a dtype that rois may have. None is zero.
        output_size: kh and kw, or one number for both.
        spatial_scale: pixels of the features for each pixel of the image.
        sampling_ratio: points of a bin along each dimension; 0 or less takes the bin's height and
            width in pixels of the features, rounded up.
        gamma: what the offsets are multiplied by.
        position_sensitive: whether each bin pools channels of its own. The input then has
            Co · kh · kw channels: for each output channel, those of its bins in row-major order.

    Returns:
        Tensor of shape (R, Co, kh, kw) in the input's dtype, contiguous; Co is C unless
        `position_sensitive`.

    Raises:
        TypeError: an argument is no tensor or number, or has another dtype than it must.
        ValueError: a shape, a device or a number does not fit the others.
        RuntimeError: a RoI is on an image that the batch does not have, or rois differ between the
            examples of a torch.vmap. On CUDA the first is a device-side assertion, as for any index
            out of range, because the host does not wait to see the numbers.

    Example:
        >>> rois = torch.tensor([[0, 4.0, 4.0, 28.0, 20.0]])
        >>> deform_roi_pool(torch.randn(1, 8, 16, 16), rois, torch.zeros(1, 2, 7, 7), 7, 0.5).shape
        torch.Size([1, 8, 7, 7])
    """
    output_size = pair("output_size", output_size, at_least=1)
    position_sensitive = flag("position_sensitive", position_sensitive)
    spatial_scale = number("spatial_scale", spatial_scale)
    gamma = number("gamma", gamma)
    sampling_ratio = as_int(sampling_ratio)
    _check_numbers(spatial_scale, sampling_ratio)
    sampling_ratio = sampling_ratio if sampling_ratio > 0 else 0
    check_tensors(_DIMENSIONS, optional=("offset",), input=input, rois=rois, offset=offset)
    rois, offset = autocast_coordinates(input, rois, offset)
    check_types(input, {}, {"rois": rois, "offset": offset})
    _check_shapes(input, rois, offset, output_size, position_sensitive)
    if position_sensitive:
        # The operator takes the channels bin by bin, as it pools neighbouring channels together.
        bins = output_size[0] * output_size[1]
        input = input.unflatten(1, (-1, bins)).transpose(1, 2).flatten(1, 2)
    if is_transformed() and is_batched(rois):
        raise RuntimeError(
            "rois: expected the same for every example of torch.vmap (in_dims=None), as their "
            "numbers decide how many points are sampled: give all rois in one call instead, each "
            "with the number of its image"
        )
    wide = coordinate_dtype(input.dtype)
    return _OPERATOR(
        input,
        rois.to(wide),
        None if offset is None else offset.to(wide),
        output_size,
        spatial_scale,
        sampling_ratio,
        gamma,
        position_sensitive,
    )


# ------------------------------------------------------------------------------------------- checks


def _check_numbers(spatial_scale: float, sampling_ratio: int) -> None:
    if spatial_scale <= 0:
        raise ValueError(f"spatial_scale: expected a positive number, got {spatial_scale!r}")
    if not is_whole(sampling_ratio):
        raise TypeError(f"sampling_ratio: expected an int, got {sampling_ratio!r}")
    if sampling_ratio > MOST_POINTS:
        raise ValueError(
            f"sampling_ratio: expected at most {MOST_POINTS} points, got {sampling_ratio}"
        )


def _check_shapes(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    position_sensitive: bool,
) -> None:
    channels, height, width = input.shape[1:]
    if input.shape[0] == 0 and rois.shape[0] > 0:
        raise ValueError(f"rois: expected none, as input has no images, got {rois.shape[0]}")
    check_channels(input, channels)
    check_sides(input, (height, width), ("height", "width"))
    if max(output_size) >= LONGEST_SIDE:
        raise ValueError(f"output_size: expected numbers below 2**30, got {output_size}")
    if rois.shape[1] != 5:
        raise ValueError(
            "rois: expected 5 columns, the number of the image, x1, y1, x2 and y2, "
            f"got shape {tuple(rois.shape)}"
        )
    bins = output_size[0] * output_size[1]
    if position_sensitive:
        if channels % bins != 0:
            raise ValueError(
                f"input: expected a multiple of {bins} channels, as many as output_size "
                f"{output_size} has bins, where position_sensitive, got {channels}"
            )
        channels //= bins
    if offset is None:
        return
    groups = offset.shape[1] // 2
    if offset.shape[1] % 2 != 0 or groups < 1 or channels % groups != 0:
        raise ValueError(
            "offset: offset.shape[1] is not valid: expected 2 · deform_groups, where deform_groups "
            f"divides the {channels} channels of the output (2 for one group), "
            f"got {offset.shape[1]}"
        )
    expected = (rois.shape[0], offset.shape[1], *output_size)
    if offset.shape != expected:
        raise ValueError(
            f"offset: expected shape {expected}, the number of rois and output_size, "
            f"got {tuple(offset.shape)}"
        )


def _check_compiled(
    input, rois, offset, output_size, spatial_scale, sampling_ratio, gamma, position_sensitive
) -> None:
    """Check the compiled operator's arguments."""
    output_size = pair("output_size", output_size, at_least=1)
    number("gamma", gamma)
    _check_numbers(number("spatial_scale", spatial_scale), sampling_ratio)
    check_tensors(_DIMENSIONS, optional=("offset",), input=input, rois=rois, offset=offset)
    _check_shapes(input, rois, offset, output_size, position_sensitive)


# ------------------------------------------------------------------------------------------- wiring


def _reference(input, rois, offset, output_size, *numbers) -> Tensor:
    """The reference; it takes the channels in the order of the public function."""
    position_sensitive = numbers[-1]
    if position_sensitive:
        bins = math.prod(output_size)
        input = input.unflatten(1, (bins, -1)).transpose(1, 2).flatten(1, 2)
    return reference.deform_roi_pool(input, rois, offset, output_size, *numbers)


def _empty_output(input, rois, output_size, position_sensitive, **_) -> Tensor:
    channels = input.shape[1]
    if position_sensitive:
        channels = channels // (output_size[0] * output_size[1])
    return input.new_empty((rois.shape[0], channels, *output_size))


def _multiply_adds(*, sampling_ratio, output, **_) -> int:
    """Multiplications of one call: four for each point of a bin in each channel.

    Where the number of points is adaptive, it follows from the values in rois, which are unknown
    when operations are counted: one point is then counted for each bin, the least possible.
    """
    return 4 * math.prod(output) * max(sampling_ratio, 1) ** 2


_OPERATOR = register(
    "deform_roi_pool",
    reference=_reference,
    public="deform_roi_pool",
    check=_check_compiled,
    output=_empty_output,
    multiply_adds=_multiply_adds,
    own_pass="input",
    layouts=("input",),
)
