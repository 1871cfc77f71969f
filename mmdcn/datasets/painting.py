"""Pixels of the warped-shapes images: textured shapes on cluttered backgrounds."""

import cv2
import numpy as np

from .shapes import Instance

# Distance in RGB from an instance's main colour to the mean of the background under it.
MIN_CONTRAST = 90.0
# How far a texture goes from its main colour towards another random one.
TEXTURE_DEPTH = (0.2, 0.5)
PATCH_OPACITY = 0.6


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft colours, patches of texture and scribbles: (size, size, 3) float32."""
    image = _smooth_noise(rng, size, 4, 3) * 150 + 50
    for _ in range(rng.integers(2, 5)):
        patch = _smooth_noise(rng, size, int(rng.integers(4, 9)))
        alpha = np.clip((patch - rng.uniform(0.5, 0.7)) * 12, 0, 1) * PATCH_OPACITY
        texture = _texture(rng, _pixel_grid(size, size) / size * 8)
        image += alpha * (_blend(_color(rng), _color(rng), texture) - image)
    canvas = to_uint8(image)
    for _ in range(rng.integers(6, 16)):
        # A random walk with a slowly turning heading.
        turns = np.cumsum(rng.normal(0, 0.5, int(rng.integers(2, 12)))) + rng.uniform(0, 2 * np.pi)
        steps = rng.uniform(0.02, 0.1) * size * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        walk = np.cumsum(steps, axis=0) + rng.uniform(0, size, 2)
        thickness = int(rng.integers(1, 4))
        points = np.round(walk).astype(np.int32)
        cv2.polylines(canvas, [points], False, _color(rng).tolist(), thickness, cv2.LINE_AA)
    return canvas.astype(np.float32)


def paint(
    rng: np.random.Generator, image: np.ndarray, instance: Instance, mask: np.ndarray
) -> None:
    """Paint an instance, its texture warped with it, onto a float image in place."""
    rows, columns = np.nonzero(mask)
    window = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    under = image[window]
    alpha = mask[window][..., None]
    background = (under * alpha).sum((0, 1)) / alpha.sum()

    candidates = np.stack([_color(rng) for _ in range(16)])
    contrast = np.linalg.norm(candidates - background, axis=1)
    first = candidates[np.argmax(contrast >= MIN_CONTRAST)]  # the first colour that has enough
    second = _blend(first, _color(rng), rng.uniform(*TEXTURE_DEPTH))

    height, width = under.shape[:2]
    corner = np.array([columns.min(), rows.min()], np.float32)
    points = instance.to_template(_pixel_grid(height, width) + corner).astype(np.float32)
    shading = 1 + points @ rng.uniform(-0.12, 0.12, (2, 1)).astype(np.float32)
    texture = _texture(rng, points * 2)
    image[window] += alpha * (_blend(first, second, texture) * shading - under)


def to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """A random pattern with a period around 1, at (H, W, 2) points: (H, W, 1) in [0, 1]."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = rng.uniform(0.8, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]], points.dtype) * points.dtype.type(
        2 * np.pi * frequency
    )
    x, y = np.moveaxis(points @ turn, -1, 0)
    kind = rng.integers(5)
    if kind == 0:  # plain
        value = np.zeros_like(x)
    elif kind == 1:  # stripes
        value = _soft_step(np.sin(x + phase))
    elif kind == 2:  # checks
        value = _soft_step(np.sin(x / 1.5 + phase) * np.sin(y / 1.5) * 2)
    elif kind == 3:  # dots
        value = _soft_step(np.cos(x) + np.cos(y) - 0.9)
    else:  # ripples
        value = 0.5 + 0.5 * np.sin(x + phase + 1.5 * np.sin(y))
    return value[..., None]


def _soft_step(value: np.ndarray) -> np.ndarray:
    return np.clip(value * 3 + 0.5, 0, 1)


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return first + (second - first) * weight


def _color(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(15, 240, 3).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """Random values on a coarse grid, interpolated: (size, size, channels) float32 in [0, 1]."""
    coarse = rng.random((cells, cells, channels), dtype=np.float32)
    fine = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(fine.reshape(size, size, channels), 0, 1)


def _pixel_grid(height: int, width: int) -> np.ndarray:
    """Pixel centres (x, y) in continuous coordinates: (height, width, 2) float32."""
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    x, y = np.meshgrid(columns + 0.5, rows + 0.5)
    return np.stack([x, y], axis=-1)
