"""Pictures of what a detector with deformable layers does."""

from .detections import draw_instances, image_grid
from .sampling import (
    Sampling,
    SamplingPoints,
    draw_sampling_points,
    points_in_image,
    record_sampling,
    sampling_locations,
)

__all__ = [
    "Sampling",
    "SamplingPoints",
    "draw_instances",
    "draw_sampling_points",
    "image_grid",
    "points_in_image",
    "record_sampling",
    "sampling_locations",
]
