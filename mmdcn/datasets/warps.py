"""Smooth, invertible warps of the plane, each with a strength from 0 (the identity) upwards.

A warp maps the template square [-1, 1]² and some way beyond it. Drawing a warp takes the same
random numbers whatever its strength, so that one generator state gives one warp at every strength.
"""

import math
from dataclasses import dataclass

import numpy as np

KINDS = ("affine", "projective", "elastic")

# The bounds of uniform distributions at strength 1; all are multiplied by the strength.
MAX_ROTATION = np.deg2rad(40)  # affine
MAX_LOG_STRETCH = 0.2  # affine: one axis grows by exp(stretch), the other shrinks by as much
MAX_SHEAR = 0.25  # affine
MAX_TILT = np.deg2rad(32)  # projective: about the x axis and about the y axis
MAX_SPEED = 0.22  # elastic: of each wave, in template units

TILT_LIMIT = np.deg2rad(60)  # beyond it the plane is seen edge on
VIEWING_DISTANCE = 2.5  # from the pinhole to the template's centre, in template units
NUM_WAVES = 4
WAVELENGTHS = (1.5, 3.0)  # template units
FLOW_STEPS = 3  # per unit of time


@dataclass(frozen=True)
class ProjectiveWarp:
    """A homography; affine warps are those with the last row (0, 0, 1).

    Args:
        matrix: (3, 3), acting on homogeneous column vectors (x, y, 1).

    Example:
        >>> ProjectiveWarp(np.diag([2, 4, 1])).forward(np.array([0.5, 1.0]))
        array([1., 4.])
    """

    matrix: np.ndarray

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) points (x, y) of the template."""
        return _apply_homography(self.matrix, points)

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) warped points (x, y) back to the template."""
        return _apply_homography(np.linalg.inv(self.matrix), points)


@dataclass(frozen=True)
class ElasticWarp:
    """The flow of a steady, smooth velocity field: invertible however long it runs.

    The velocity at x is Σ_k velocities[k] · sin(wavevectors[k] · x + phases[k]).

    Args:
        velocities: (K, 2), template units per unit of time.
        wavevectors: (K, 2), radians per template unit.
        phases: (K,), radians.
        duration: how long the flow runs.

    Example:
        >>> waves = {"wavevectors": np.array([[0, np.pi]]), "phases": np.zeros(1)}
        >>> shear = ElasticWarp(velocities=np.array([[0.2, 0]]), **waves, duration=1.0)
        >>> shear.forward(np.array([0, 0.5]))
        array([0.2, 0.5])
    """

    velocities: np.ndarray
    wavevectors: np.ndarray
    phases: np.ndarray
    duration: float

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) points (x, y) of the template."""
        return self._flow(points, self.duration)

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) warped points (x, y) back to the template."""
        return self._flow(points, -self.duration)

    def _velocity(self, points: np.ndarray) -> np.ndarray:
        dtype = points.dtype
        angles = points @ self.wavevectors.T.astype(dtype) + self.phases.astype(dtype)
        return np.sin(angles) @ self.velocities.astype(dtype)

    def _flow(self, points: np.ndarray, duration: float) -> np.ndarray:
        """Fourth-order Runge-Kutta: forward and back agree to a thousandth of the template."""
        num_steps = math.ceil(abs(duration) * FLOW_STEPS)
        for _ in range(num_steps):
            step = duration / num_steps
            k1 = self._velocity(points)
            k2 = self._velocity(points + step / 2 * k1)
            k3 = self._velocity(points + step / 2 * k2)
            k4 = self._velocity(points + step * k3)
            points = points + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return points


Warp = ProjectiveWarp | ElasticWarp


def draw_warp(rng: np.random.Generator, kind: str, strength: float) -> Warp:
    """Draw a random warp.

    Args:
        rng: source of randomness; how much is taken from it depends on ``kind`` alone.
        kind: one of ``KINDS``.
        strength: ≥ 0. At 0 the warp is the identity; every parameter grows in proportion.

    Raises:
        ValueError: ``kind`` is not one of ``KINDS``.

    Example:
        >>> draw_warp(np.random.default_rng(7), "affine", strength=0).forward(np.array([0.5, 1.0]))
        array([0.5, 1. ])
    """
    if kind == "affine":
        return _draw_affine(rng, strength)
    if kind == "projective":
        return _draw_projective(rng, strength)
    if kind == "elastic":
        return _draw_elastic(rng, strength)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def _draw_affine(rng: np.random.Generator, strength: float) -> ProjectiveWarp:
    """Rotation · stretch · shear, of determinant one."""
    rotation, stretch, shear = (
        rng.uniform(-1, 1, 3) * strength * [MAX_ROTATION, MAX_LOG_STRETCH, MAX_SHEAR]
    )
    matrix = np.eye(3)
    matrix[:2, :2] = (
        _rotation_2d(rotation)
        @ np.diag([np.exp(stretch), np.exp(-stretch)])
        @ np.array([[1, shear], [0, 1]])
    )
    return ProjectiveWarp(matrix)


def _draw_projective(rng: np.random.Generator, strength: float) -> ProjectiveWarp:
    """The template tilted in space, seen through a pinhole."""
    tilt_x, tilt_y = np.clip(rng.uniform(-1, 1, 2) * strength * MAX_TILT, -TILT_LIMIT, TILT_LIMIT)
    about_x, about_y = np.eye(3), np.eye(3)
    about_x[1:, 1:] = _rotation_2d(tilt_x)
    about_y[::2, ::2] = _rotation_2d(tilt_y)
    rotation = about_x @ about_y
    # A template point (u, v) is at u · r1 + v · r2 + (0, 0, distance), with r1, r2 the rotation's
    # first columns; the focal length equals the distance, so that no tilt is the identity.
    matrix = np.stack([rotation[:, 0], rotation[:, 1], [0, 0, VIEWING_DISTANCE]], axis=1)
    matrix[:2] *= VIEWING_DISTANCE
    return ProjectiveWarp(matrix / VIEWING_DISTANCE)


def _draw_elastic(rng: np.random.Generator, strength: float) -> ElasticWarp:
    direction, heading = rng.uniform(0, 2 * np.pi, (2, NUM_WAVES))
    wavelength = rng.uniform(*WAVELENGTHS, NUM_WAVES)
    speed = rng.uniform(0.5, 1, NUM_WAVES) * MAX_SPEED
    return ElasticWarp(
        velocities=speed[:, None] * _unit_vectors(heading),
        wavevectors=(2 * np.pi / wavelength)[:, None] * _unit_vectors(direction),
        phases=rng.uniform(0, 2 * np.pi, NUM_WAVES),
        duration=strength,
    )


def _rotation_2d(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _unit_vectors(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _apply_homography(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    homogeneous = points @ matrix[:, :2].T + matrix[:, 2]
    return homogeneous[..., :2] / homogeneous[..., 2:]
