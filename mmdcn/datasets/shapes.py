"""Shapes of the warped-shapes images: their outlines, their places and their annotations."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import shapely

from .parameters import Parameters
from .warps import KINDS, Warp, draw_warp


def _glyph(strokes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """The outline of axis-parallel bars, each (left, top, right, bottom)."""
    outline = shapely.union_all([shapely.box(*bar) for bar in strokes])
    return np.array(outline.exterior.coords)[:-1]


def _regular(num_points: int, radii: Sequence[float]) -> np.ndarray:
    """Points around the origin at equal angles, the first on top, at the radii in turn."""
    angles = np.arange(num_points) * 2 * np.pi / num_points - np.pi / 2
    radius = np.resize(radii, num_points)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Outline of each class, (P, 2) as (x, y) with y down, within the template square [-1, 1]². None is
# a warped copy of another, and each equals its own mirror image, left and right swapped, so that
# training images may be flipped.
TEMPLATES = {
    "disc": _regular(96, [1]),
    "triangle": _regular(3, [1]),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.9,
    "star": _regular(10, [1, 0.42]),
    "T": _glyph([(-0.9, -1, 0.9, -0.4), (-0.3, -1, 0.3, 1)]),
    "H": _glyph([(-0.9, -1, -0.35, 1), (0.35, -1, 0.9, 1), (-0.9, -0.27, 0.9, 0.27)]),
    "U": _glyph([(-0.9, -1, -0.3, 1), (0.3, -1, 0.9, 1), (-0.9, 0.4, 0.9, 1)]),
}
CLASSES = tuple(TEMPLATES)

# At least this share of an instance's area lies inside the image.
MIN_VISIBLE = 0.75
# Pixels between two instances. As these never overlap, every polygon is all of its instance.
MIN_GAP = 2.0
PLACEMENT_TRIES = 30
# Annotated polygons stray from the true contour by at most this many pixels.
CONTOUR_TOLERANCE = 0.03
# OpenCV fills the pixels that the contour touches: a mask is half a fine pixel too wide all around.
SUPERSAMPLING = 8


@dataclass(frozen=True)
class Instance:
    """One shape, placed in an image; continuous image coordinates, pixel i covers [i, i + 1].

    Args:
        label: index into ``CLASSES``.
        kind: the kind of the warp, one of ``warps.KINDS``.
        warp: from the template to the warped template.
        origin: (2,), the point of the warped template that lands on ``position``.
        scale: pixels per unit of the warped template.
        position: (2,), (x, y) in the image.
        outline: the whole contour in the image, parts beyond the border included.

    Example:
        >>> parameters = Parameters()
        >>> scene = draw_scene(parameters, parameters.splits()[0], index=0)
        >>> points = np.zeros((5, 2))
        >>> scene.instances[0].to_template(points).shape
        (5, 2)
    """

    label: int
    kind: str
    warp: Warp
    origin: np.ndarray
    scale: float
    position: np.ndarray
    outline: shapely.Polygon

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) image points (x, y) to the template."""
        centred = (points - self.position.astype(points.dtype)) / self.scale
        return self.warp.inverse(centred + self.origin.astype(points.dtype))


def place(
    rng: np.random.Generator, parameters: Parameters, strength: float, others: list[Instance]
) -> Instance | None:
    """Draw an instance and the first of its random positions that is free; None if none is."""
    image_size = parameters.image_size
    label = int(rng.integers(len(CLASSES)))
    kind = KINDS[rng.integers(len(KINDS))]
    # The size is uniform in the logarithm, so that small instances are as many as large ones.
    size = np.exp(rng.uniform(*np.log([parameters.min_size, parameters.max_size]))) * image_size
    positions = rng.uniform(0, image_size, (PLACEMENT_TRIES, 2))
    warp = draw_warp(rng, kind, strength)

    template = TEMPLATES[CLASSES[label]]
    contour = shapely.Polygon(warp.forward(_densify(template)))
    if not contour.is_valid:
        return None
    longest_side = np.ptp(template, axis=0).max()
    scale = size / longest_side * np.sqrt(shapely.Polygon(template).area / contour.area)
    origin = shapely.get_coordinates(contour.centroid)[0]
    shape = (np.array(contour.exterior.coords) - origin) * scale
    frame = shapely.box(0, 0, image_size, image_size)
    taken = shapely.union_all([other.outline.buffer(MIN_GAP) for other in others])
    for position in positions:
        outline = shapely.Polygon(shape + position)
        visible = shapely.intersection(outline, frame).area / outline.area
        if visible >= MIN_VISIBLE and not outline.intersects(taken):
            return Instance(label, kind, warp, origin, scale, position, outline)
    return None


def annotate(instance: Instance, image_size: int) -> dict:
    """The COCO fields of an instance, all three from the same polygons, clipped to the image.

    Returns:
        ``segmentation`` (the polygons), ``bbox`` (their tight box, x, y, width, height) and
        ``area`` (theirs), in pixels.

    Example:
        >>> parameters = Parameters()
        >>> scene = draw_scene(parameters, parameters.splits()[0], index=0)
        >>> sorted(annotate(scene.instances[0], parameters.image_size))
        ['area', 'bbox', 'segmentation']
    """
    visible = shapely.intersection(instance.outline, shapely.box(0, 0, image_size, image_size))
    visible = shapely.simplify(visible, CONTOUR_TOLERANCE)
    parts = [part for part in shapely.get_parts(visible) if part.area > 0.5]
    polygons = [np.round(np.array(part.exterior.coords)[:-1], 2) for part in parts]
    points = np.concatenate(polygons)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "bbox": np.round([left, top, right - left, bottom - top], 2).tolist(),
        "area": round(sum(shapely.Polygon(polygon).area for polygon in polygons), 3),
    }


def rasterize(outline: shapely.Polygon, size: int) -> np.ndarray:
    """The covered fraction of each pixel: (size, size) float32 in [0, 1].

    Example:
        >>> rasterize(shapely.box(1, 1, 3, 2), size=4).round()
        array([[0., 0., 0., 0.],
               [0., 1., 1., 0.],
               [0., 0., 0., 0.],
               [0., 0., 0., 0.]], dtype=float32)
    """
    # A window around the whole outline: OpenCV smears what lies outside of its canvas.
    bounds = np.array(outline.bounds)
    left, top = np.floor(bounds[:2]).astype(int).tolist()
    right, bottom = np.ceil(bounds[2:]).astype(int).tolist()
    width, height = right - left, bottom - top
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    # OpenCV has pixel centres on the integers, the outline has them on the halves.
    points = (np.array(outline.exterior.coords) - [left, top]) * SUPERSAMPLING - 0.5
    shift = 4  # fractional bits of the fixed-point coordinates that OpenCV takes
    cv2.fillPoly(fine, [np.round(points * 2**shift).astype(np.int32)], 255, shift=shift)
    covered = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    mask = np.zeros((size, size), np.float32)
    inside = np.s_[max(0, -top) : size - top, max(0, -left) : size - left]
    mask[max(0, top) : bottom, max(0, left) : right] = covered[inside].astype(np.float32) / 255
    return mask


def _densify(outline: np.ndarray, spacing: float = 0.03) -> np.ndarray:
    """Points along a closed outline, (P, 2), at most ``spacing`` apart, the corners among them."""
    ring = shapely.LinearRing(outline)
    return np.array(shapely.segmentize(ring, spacing).coords)[:-1]
