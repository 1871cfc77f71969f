"""Transformations of digits: rotation, scale, shear, perspective, elastic, and all at once.

Each has a strength from 0, the identity, upwards. Drawing takes the same random numbers at every
strength, so that one generator state gives one transformation at growing strengths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .digits import SIZE

#: The transformations by themselves, and `all`: all of these, and a shift.
KINDS = ("rotation", "scale", "shear", "perspective", "elastic")
ALL = "all"

CANVAS = 40  # height and width of the transformed images in pixels

# The bounds of uniform distributions at strength 1; all are multiplied by the strength.
MAX_ROTATION = math.radians(60)
MAX_LOG_SCALE = math.log(1.6)  # a digit of 20 pixels becomes one of 12 to 32
MAX_SHEAR = 0.8
# Perspective: how much nearer one side of the digit's 28 pixels is than the middle, on each axis.
MAX_TILT = 0.4
MAX_SHIFT = 3.0  # pixels, on each axis
ELASTIC = 1.2  # standard deviation of the displacement in pixels of the digit
ELASTIC_CELLS = 4  # random displacements on each axis, smoothly interpolated

_NUMBERS = 7  # rotation, scale, shear, tilt in x and y, shift in x and y
_NEAREST = 0.1  # what is nearer to the eye than this part of the distance is not seen


def transform(images: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    """Transform each image by a transformation of its own.

    Args:
        images: (N, 28, 28).
        kind: one of :data:`KINDS`, or :data:`ALL`.
        strength: from 0.
        generator: of the random numbers; how many are taken depends on N alone.

    Returns:
        (N, 1, 40, 40): the digit in the middle of a larger black canvas, transformed.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in (*KINDS, ALL):
        raise ValueError(f"kind: expected one of {', '.join((*KINDS, ALL))}, got {kind!r}")
    count = len(images)
    numbers = torch.rand(count, _NUMBERS, generator=generator) * 2 - 1
    bends = torch.randn(count, 2, ELASTIC_CELLS, ELASTIC_CELLS, generator=generator)
    chosen = torch.zeros(_NUMBERS)
    for name, places in {
        "rotation": [0], "scale": [1], "shear": [2], "perspective": [3, 4], ALL: range(_NUMBERS)
    }.items():  # fmt: skip
        if kind == name:
            chosen[list(places)] = strength
    bend = strength * ELASTIC if kind in ("elastic", ALL) else 0.0
    points = _points_of_digit(numbers * chosen)
    if bend:
        points = points + _bends(points, bends * bend)
    return _sample(images[:, None], points)


def similarity(images: Tensor, angle: float = 0.0, factor: float = 1.0) -> Tensor:
    """Turn each image by the same angle, in radians and clockwise, and enlarge it by a factor.

    Returns:
        (N, 1, 40, 40), for images of (N, 28, 28).
    """
    numbers = torch.zeros(len(images), _NUMBERS)
    numbers[:, 0] = angle / MAX_ROTATION
    numbers[:, 1] = math.log(factor) / MAX_LOG_SCALE
    return _sample(images[:, None], _points_of_digit(numbers))


def warp_features(features: Tensor, angle: float = 0.0, factor: float = 1.0) -> Tensor:
    """Turn and enlarge maps (N, C, S, S) of the canvas as :func:`similarity` does with digits.

    Position i of a map lies at pixel i · stride of the canvas, as after padded convolutions. What
    comes from outside is zero.
    """
    stride = CANVAS / features.shape[-1]
    middle = (stride - 1) / CANVAS  # of the canvas, from the map's own, in halves of the map
    cosine, sine = math.cos(angle) / factor, math.sin(angle) / factor
    matrix = features.new_tensor([[cosine, sine], [-sine, cosine]])
    shift = middle * (1 - matrix.sum(dim=1, keepdim=True))
    matrix = torch.cat([matrix, shift], dim=1)
    shape = list(features.shape)
    grid = F.affine_grid(matrix.expand(shape[0], 2, 3), shape, align_corners=False)
    return F.grid_sample(features, grid, align_corners=False)


def _points_of_digit(numbers: Tensor) -> Tensor:
    """Where each pixel of the canvas comes from, in pixels from the digit's middle.

    Args:
        numbers: (N, 7), from -1 to 1 at strength 1.

    Returns:
        (N, 40, 40, 2), x and y.
    """
    axis = torch.arange(CANVAS) - (CANVAS - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = torch.stack([x, y], dim=-1).view(1, -1, 2)
    angle, scale, shear = numbers[:, 0] * MAX_ROTATION, numbers[:, 1], numbers[:, 2] * MAX_SHEAR
    cosine, sine = angle.cos(), angle.sin()
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    # The inverse: from the canvas to the digit.
    turn = torch.stack([cosine, sine, -sine, cosine], dim=-1).view(-1, 2, 2)
    slant = torch.stack([one, -shear, zero, one], dim=-1).view(-1, 2, 2)
    matrix = slant @ turn * (-scale * MAX_LOG_SCALE).exp()[:, None, None]
    points = (canvas - MAX_SHIFT * numbers[:, None, 5:7]) @ matrix.transpose(1, 2)
    depth = 1 + points @ (numbers[:, 3:5, None] * MAX_TILT) / (SIZE / 2)
    points = points / depth.clamp(min=_NEAREST)
    points = points.masked_fill(depth < _NEAREST, 10.0 * SIZE)
    return points.view(-1, CANVAS, CANVAS, 2)


def _bends(points: Tensor, bends: Tensor) -> Tensor:
    """Displacements (N, H, W, 2) at points, from coarse random ones (N, 2, cells, cells)."""
    fields = F.interpolate(bends, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    grid = points / (SIZE / 2)
    sampled = F.grid_sample(fields, grid, padding_mode="border", align_corners=False)
    return sampled.permute(0, 2, 3, 1)


def _sample(images: Tensor, points: Tensor) -> Tensor:
    return F.grid_sample(images, points / (SIZE / 2), align_corners=False)
