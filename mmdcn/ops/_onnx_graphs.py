"""Our operators as graphs of ONNX's standard ones, for both of torch's exporters.

Each function here builds what one operator becomes, from values of a graph. How a graph gets its
nodes differs between the exporters, and is behind :class:`Graph`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch

#: The first version of ONNX's operators that has DeformConv.
OPSET = 19

#: A value of a graph; None is an input that is left out.
Value = Any

# ONNX's number of an element type, which Cast takes.
_INT64 = 7

# By how much a bin is made smaller whose size says how many points are sampled in it: rounding
# must not add a row of points to one of whole pixels.
_SHRINK = 1 - 2**-20


class Graph(Protocol):
    """What a graph is built with."""

    def op(self, name: str, *inputs: Value, **attributes: Any) -> Value:
        """The output of a node, which has one."""

    def constant(self, values: torch.Tensor) -> Value: ...

    def size(self, value: Value, dimension: int, name: str) -> int:
        """A size that is known; `name` is the argument's, for the error where it is not."""

    def dtype(self, value: Value) -> Any:
        """Something that is equal for values of the same element type."""


def deform_conv2d(
    graph: Graph,
    input: Value,
    offset: Value,
    weight: Value,
    bias: Value,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: Value,
) -> Value:
    """``DeformConv``, whose offsets have the order of ours."""
    kernel = [graph.size(weight, dimension, "weight") for dimension in (2, 3)]
    groups = graph.size(input, 1, "input") // graph.size(weight, 1, "weight")
    offset_groups = graph.size(offset, 1, "offset") // (2 * math.prod(kernel))
    features = [input, weight, bias]
    mixed = graph.dtype(input) != graph.dtype(offset)
    if mixed:
        features = [None if t is None else graph.op("CastLike", t, offset) for t in features]
    geometry = (kernel, stride, padding, dilation)
    output = _deform_conv(graph, *features, offset, mask, groups, offset_groups, *geometry)
    return graph.op("CastLike", output, input) if mixed else output


def _deform_conv(
    graph: Graph,
    input: Value,
    weight: Value,
    bias: Value,
    offset: Value,
    mask: Value,
    groups: int,
    offset_groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Value:
    """The node, whose inputs have one element type."""
    return graph.op(
        "DeformConv",
        input,
        weight,
        offset,
        bias,
        mask,
        dilations=list(dilation),
        group=groups,
        kernel_shape=list(kernel_size),
        offset_group=offset_groups,
        pads=[*padding, *padding],
        strides=list(stride),
    )


# -------------------------------------------------------------------------------- DCNv3 and DCNv4


def deform_aggregate(
    graph: Graph,
    input: Value,
    offset: Value,
    mask: Value,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> Value:
    """``DeformConv`` of each channel by itself, with weights of one.

    Taps come column by column, and x before y. So rows and columns change places here, and what
    ``DeformConv`` takes in its own order is then in ours, and neither are points gathered nor
    memory moved more than for the channels, which come last in ours.
    """
    channels, groups = graph.size(input, 3, "input"), graph.size(offset, 3, "offset")
    taps = math.prod(kernel_size)
    mixed = graph.dtype(input) != graph.dtype(offset)
    features = graph.op("CastLike", input, offset) if mixed else input
    weight = _constant(graph, torch.ones(channels, 1, *reversed(kernel_size)), offset)
    points = [_scaled(graph, offset, kernel_size, dilation, offset_scale, remove_center), mask]
    if remove_center:
        # A tap that counts nothing.
        points = [_with_zeros(graph, t, n * (taps // 2), n) for t, n in zip(points, (2, 1))]
    # (N, Ho, Wo, groups, ...) as (N, channels, Wo, Ho)
    points = [_columns_first(graph, _reshaped(graph, t, [0, 0, 0, -1])) for t in points]
    geometry = (list(reversed(each)) for each in (kernel_size, stride, padding, dilation))
    output = _deform_conv(
        *(graph, _columns_first(graph, features), weight, None, *points, channels, groups),
        *geometry,
    )
    output = _columns_first(graph, output)
    return graph.op("CastLike", output, input) if mixed else output


def _constant(graph: Graph, values: torch.Tensor, like: Value) -> Value:
    """A constant in the element type of another value."""
    return graph.op("CastLike", graph.constant(values), like)


def _columns_first(graph: Graph, value: Value) -> Value:
    """(N, H, W, C) as (N, C, W, H), and the reverse."""
    return graph.op("Transpose", value, perm=[0, 3, 2, 1])


def _reshaped(graph: Graph, value: Value, shape: Sequence[int]) -> Value:
    return graph.op("Reshape", value, graph.constant(torch.tensor(shape)))


def _scaled(
    graph: Graph,
    offset: Value,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> Value:
    """The offsets from the regular grid of taps, of those that are scaled with the grid.

    ``s · (p + Δp)`` is as far from ``p`` as ``s · Δp + (s - 1) · p``.
    """
    if offset_scale == 1:
        return offset
    taps_y, taps_x = (
        torch.arange(size) * step - step * (size - 1) // 2
        for size, step in zip(kernel_size, dilation)
    )
    grid = torch.cartesian_prod(taps_x, taps_y).view(-1, 2)
    if remove_center:
        center = len(grid) // 2
        grid = torch.cat([grid[:center], grid[center + 1 :]])
    scale = _constant(graph, torch.tensor(offset_scale), offset)
    shift = _constant(graph, (offset_scale - 1) * grid.flatten(), offset)
    return graph.op("Add", graph.op("Mul", offset, scale), shift)


def _with_zeros(graph: Graph, value: Value, place: int, number: int) -> Value:
    """`value` with so many zeros at a place in its last of five dimensions."""
    axis = graph.constant(torch.tensor([4]))

    def part(start: int, end: int) -> Value:
        ends = (graph.constant(torch.tensor([each])) for each in (start, end))
        return graph.op("Slice", value, *ends, axis)

    pads = graph.constant(torch.tensor([0] * 9 + [number]))
    first = graph.op("Pad", part(0, place), pads)
    return graph.op("Concat", first, part(place, torch.iinfo(torch.int64).max), axis=4)


# ------------------------------------------------------------------------------------ RoI pooling


def deform_roi_pool(
    graph: Graph,
    input: Value,
    rois: Value,
    offset: Value,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    position_sensitive: bool,
) -> Value:
    """``RoiAlign``, to which each bin is a RoI of one bin.

    (By ``GridSample`` each RoI would need a copy of its image's features.)
    """
    if position_sensitive:
        raise NotImplementedError(
            "position-sensitive RoI pooling has no counterpart among ONNX's standard operators, as "
            "RoiAlign pools all bins from the same channels"
        )
    mixed = graph.dtype(input) != graph.dtype(rois)
    features = graph.op("CastLike", input, rois) if mixed else input
    bins = math.prod(output_size)
    corners, sizes = _bins(graph, rois, output_size, sampling_ratio)
    images = _images(graph, rois, bins)
    if offset is not None:
        scale = _constant(graph, torch.tensor(gamma), rois)
        extent = graph.op("Mul", _extent(graph, rois), scale)
    groups = 1 if offset is None else graph.size(offset, 1, "offset") // 2
    channels = graph.size(input, 1, "input")
    pooled = []
    for group in range(groups):
        own = features if groups == 1 else _slice(graph, features, group, channels // groups)
        moved = corners
        if offset is not None:
            moves = _slice(graph, offset, group, 2)
            moves = _reshaped(graph, moves, [-1, 2, bins])
            moves = graph.op("Transpose", moves, perm=[0, 2, 1])
            moved = graph.op("Add", corners, graph.op("Mul", moves, extent))
        boxes = graph.op("Concat", moved, graph.op("Add", moved, sizes), axis=2)
        pooled.append(
            graph.op(
                "RoiAlign",
                own,
                _reshaped(graph, boxes, [-1, 4]),
                images,
                mode="avg",
                output_height=1,
                output_width=1,
                sampling_ratio=sampling_ratio,
                spatial_scale=spatial_scale,
                coordinate_transformation_mode="half_pixel",
            )
        )
    pooled = [_reshaped(graph, p, [-1, bins, channels // groups]) for p in pooled]
    every = pooled[0] if groups == 1 else graph.op("Concat", *pooled, axis=2)
    every = graph.op("Transpose", every, perm=[0, 2, 1])
    output = _reshaped(graph, every, [-1, channels, *output_size])
    return graph.op("CastLike", output, input) if mixed else output


def _slice(graph: Graph, value: Value, part: int, length: int) -> Value:
    """One of the parts of so many channels each."""
    bounds = (graph.constant(torch.tensor([i])) for i in (part * length, (part + 1) * length, 1))
    return graph.op("Slice", value, *bounds)


def _corner(graph: Graph, rois: Value, first: int) -> Value:
    """x and y, (R, 1, 2), of a corner whose x is in this column of the RoIs."""
    bounds = (graph.constant(torch.tensor([i])) for i in (first, first + 2, 1))
    return graph.op(
        "Unsqueeze", graph.op("Slice", rois, *bounds), graph.constant(torch.tensor([1]))
    )


def _extent(graph: Graph, rois: Value) -> Value:
    """Width and height, (R, 1, 2)."""
    return graph.op("Sub", _corner(graph, rois, 3), _corner(graph, rois, 1))


def _bins(
    graph: Graph, rois: Value, output_size: Sequence[int], sampling_ratio: int
) -> tuple[Value, Value]:
    """The upper left corners (R, bins, 2) of bins that are not moved, and their sizes (R, 1, 2)."""
    rows, columns = (torch.arange(count) / count for count in output_size)
    starts = torch.cartesian_prod(rows, columns).view(-1, 2).flip(1)
    part = torch.tensor([[1 / output_size[1], 1 / output_size[0]]])
    if sampling_ratio == 0:
        part = part * _SHRINK
    extent = _extent(graph, rois)
    starts, part = (
        graph.op("Mul", extent, _constant(graph, values, rois)) for values in (starts, part)
    )
    return graph.op("Add", _corner(graph, rois, 1), starts), part


def _images(graph: Graph, rois: Value, bins: int) -> Value:
    """The number of the image of each bin, (R · bins,)."""
    images = graph.op("Gather", rois, graph.constant(torch.zeros(bins, dtype=torch.int64)), axis=1)
    return graph.op("Cast", _reshaped(graph, images, [-1]), to=_INT64)


# --------------------------------------------------------------------------------------- volumes


def deform_conv_nd(*_: Any) -> NoReturn:
    """Deformable convolution over three dimensions, which no runtime computes."""
    raise NotImplementedError(
        "deformable convolution over three dimensions has no counterpart among ONNX's standard "
        "operators: DeformConv is over two in onnxruntime, OpenVINO and TensorRT"
    )
