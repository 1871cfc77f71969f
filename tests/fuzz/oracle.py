"""The operators by torch's own grid_sample and convolutions: an oracle beside mmdcn.ops.reference.

Nothing here shares code or intermediate steps with the reference. Arguments are those of the public
functions, in float64.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.utils import _ntuple, _pair

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


def sample(input: Tensor, points: Tensor) -> Tensor:
    """The input (B, C, *size) at points (B, P, rank) in pixels: (B, C, P).

    Zeros surround it, up to a size from which grid_sample's coordinates, between -1 and 1, are
    converted without rounding: so a whole number stays one.
    """
    size = input.shape[2:]
    if len(size) == 1:  # grid_sample knows images and volumes.
        input, size = input.unsqueeze(2), (1, *size)
        points = functional.pad(points, (1, 0))
    limits = points.new_tensor(size)
    inside = ((points > -1) & (points < limits)).all(-1)
    points = torch.where(inside.unsqueeze(-1), points, 0.0)

    spans = [2 ** math.ceil(math.log2(length + 1)) if length else 2 for length in size]
    padding = [(1, span - length) for span, length in zip(spans, size)]
    padded = functional.pad(input, tuple(itertools.chain(*reversed(padding))))
    grid = (points + 1) / (points.new_tensor(spans) / 2) - 1
    grid = grid.flip(-1).view(len(grid), *[1] * (len(size) - 1), -1, len(size))
    sampled = functional.grid_sample(padded, grid, align_corners=True).flatten(2)
    return torch.where(inside.unsqueeze(1), sampled, 0.0)


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """A plain convolution whose stride is its kernel, of the samples of all positions."""
    batch, channels, *size = input.shape
    kernel, out_size, rank = weight.shape[2:], offset.shape[2:], len(size)
    deform_groups = offset.shape[1] // (rank * math.prod(kernel))
    if batch == 0:  # for which reshape() is of two minds
        parts = (t.sum() for t in (input, offset, weight, bias, mask) if t is not None)
        return input.new_zeros(0, len(weight), *out_size) + 0 * sum(parts)
    stride, padding, dilation = (_ntuple(rank)(n) for n in (stride, padding, dilation))
    # From (batch · groups, *kernel, …, *out_size) to out_1, kernel_1, out_2, kernel_2, …
    woven = [d for i in range(rank) for d in (i + 1 + rank, i + 1)]
    points = offset.reshape(batch * deform_groups, *kernel, rank, *out_size)
    points = points.movedim(1 + rank, -1).permute(0, *woven, 2 * rank + 1)
    lengths = [n for pair in zip(out_size, kernel) for n in pair]
    regular = []
    for d in range(rank):
        position = torch.arange(out_size[d]).view(-1, 1) * stride[d] - padding[d]
        place = position + torch.arange(kernel[d]) * dilation[d]
        shape = [1] * (2 * rank)
        shape[2 * d : 2 * d + 2] = place.shape
        regular.append(place.view(shape).expand(lengths))
    points = points + torch.stack(regular, dim=-1)
    sampled = sample(
        input.reshape(batch * deform_groups, channels // deform_groups, *size),
        points.reshape(batch * deform_groups, math.prod(lengths), rank),
    )
    if mask is not None:
        modulation = mask.reshape(batch * deform_groups, *kernel, *out_size).permute(0, *woven)
        sampled = sampled * modulation.reshape(batch * deform_groups, 1, -1)
    large = [o * k for o, k in zip(out_size, kernel)]
    groups = channels // weight.shape[1]
    convolve = CONVOLUTIONS[rank]
    return convolve(sampled.reshape(batch, channels, *large), weight, bias, kernel, groups=groups)


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
    """One sample after another, for each tap of the kernel: column by column, x before y."""
    (kernel_h, kernel_w), stride, padding, dilation = map(
        _pair, (kernel_size, stride, padding, dilation)
    )
    batch, height, width, channels = input.shape
    out_h, out_w = offset.shape[1:3]
    if batch == 0:
        return input.new_zeros(0, out_h, out_w, channels) + 0 * sum(
            t.sum() for t in (input, offset, mask)
        )
    images = input.permute(0, 3, 1, 2).reshape(-1, channels // group, height, width)
    middle = [d * (k - 1) // 2 for d, k in zip(dilation, (kernel_h, kernel_w))]
    rows = torch.arange(out_h).view(-1, 1) * stride[0] - padding[0] + middle[0]
    columns = torch.arange(out_w) * stride[1] - padding[1] + middle[1]
    taps = list(itertools.product(range(kernel_w), range(kernel_h)))
    if remove_center:
        taps.remove((kernel_w // 2, kernel_h // 2))
    delta = offset.view(batch, out_h, out_w, group, len(taps), 2).movedim(3, 1)
    modulation = mask.view(batch, out_h, out_w, group, len(taps)).movedim(3, 1)
    total = input.new_zeros(batch * group, channels // group, out_h * out_w)
    for k, (tap_x, tap_y) in enumerate(taps):
        y = rows + offset_scale * (tap_y * dilation[0] - middle[0] + delta[..., k, 1])
        x = columns + offset_scale * (tap_x * dilation[1] - middle[1] + delta[..., k, 0])
        points = torch.stack([y, x], dim=-1).view(batch * group, -1, 2)
        weights = modulation[..., k].reshape(batch * group, 1, -1)
        total = total + weights * sample(images, points)
    return total.view(batch, channels, out_h, out_w).permute(0, 2, 3, 1)


def dcnv4(input: Tensor, offset_mask: Tensor, *, group: int = 1, **arguments) -> Tensor:
    """DCNv3 of the two tensors that are packed into one, for each group."""
    kernel_h, kernel_w = _pair(arguments["kernel_size"])
    taps = kernel_h * kernel_w - bool(arguments.get("remove_center"))
    points = offset_mask[..., : 3 * taps * group].unflatten(3, (group, 3 * taps))
    offset, mask = points[..., : 2 * taps].flatten(3), points[..., 2 * taps :].flatten(3)
    return dcnv3(input, offset, mask, group=group, **arguments)


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
    """The mean of the samples of every bin, for one RoI after another."""
    bins = _pair(output_size)
    number = math.prod(bins)
    channels = input.shape[1] // (number if position_sensitive else 1)
    groups = 1 if offset is None else offset.shape[1] // 2
    if offset is None:
        offset = rois.new_zeros(len(rois), 2, *bins)
    empty = input.new_zeros(0, channels, *bins) + 0 * (input.sum() + offset.sum())
    pooled = [empty]
    for roi, delta in zip(rois.detach(), offset.unflatten(1, (groups, 2))):
        image, x1, y1, x2, y2 = roi.tolist()
        axes = [
            _bin_axes(start * spatial_scale - 0.5, extent * spatial_scale, bins, d, sampling_ratio)
            + (gamma * extent * spatial_scale * delta[:, 1 - d]).flatten(1).unsqueeze(2)
            for d, (start, extent) in enumerate([(y1, y2 - y1), (x1, x2 - x1)])
        ]
        # (groups, channels of a group, maps, height, width): a map for each bin, or for all.
        maps = input[int(image)].unflatten(0, (groups, channels // groups, -1))
        pooled.append(_means(maps, *axes).view(1, channels, *bins))
    return torch.cat(pooled)


def _bin_axes(start: float, extent: float, bins: tuple[int, int], d: int, ratio: int) -> Tensor:
    """The coordinates (bins, points) of all bins' points along one dimension, without offsets."""
    length = extent / bins[d]
    points = ratio if ratio > 0 else max(math.ceil(length), 0)
    axis = [
        [start + length * (b + (k + 0.5) / points) for k in range(points)] for b in range(bins[d])
    ]
    regular = torch.tensor(axis, dtype=torch.float64).view(bins[d], points)
    regular = regular.unsqueeze(1 - d).expand(*bins, points)
    return regular.flatten(0, 1)


def _means(maps: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The means over the grids of y and x (groups, bins, points): (channels, bins).

    The border goes on for one pixel.
    """
    groups, channels, sections, height, width = maps.shape
    bins, points = y.shape[1], y.shape[2] * x.shape[2]
    if points == 0:
        return maps.new_zeros(groups * channels, bins)
    shape = (groups, bins, y.shape[2], x.shape[2])
    y, x = y.unsqueeze(3).expand(shape), x.unsqueeze(2).expand(shape)
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    moved = []
    for p, length in ((y, height), (x, width)):
        # What is moved onto the border passes no gradient.
        p = torch.where(inside & (p >= 0), p, 0.0)
        moved.append(torch.where(p >= length - 1, length - 1.0, p))
    sampled = sample(
        maps.transpose(1, 2).reshape(groups * sections, channels, height, width),
        torch.stack(moved, dim=-1).view(groups * sections, -1, 2),
    )
    inside = inside.view(groups * sections, 1, -1)
    sampled = torch.where(inside, sampled, 0.0)
    means = sampled.view(groups, sections, channels, bins // sections, points).mean(-1)
    return means.transpose(1, 2).reshape(groups * channels, bins)
