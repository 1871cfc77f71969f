"""Pictures of what a detector with deformable layers does."""

from .detections import draw_instances, image_grid
from .sampled_image import (
    SampledImage,
    check_layers,
    choose_layers,
    figure_image,
    object_centers,
    of_images,
    sample_image,
    sampling_figure,
    sampling_page,
)
from .sampling import (
    Sampling,
    SamplingPoints,
    StackedPoints,
    draw_sampling_points,
    draw_stacked_points,
    points_in_image,
    record_sampling,
    sampling_locations,
    stacked_points,
)

__all__ = [
    "SampledImage",
    "Sampling",
    "SamplingPoints",
    "StackedPoints",
    "check_layers",
    "choose_layers",
    "draw_instances",
    "draw_sampling_points",
    "draw_stacked_points",
    "figure_image",
    "image_grid",
    "object_centers",
    "of_images",
    "points_in_image",
    "record_sampling",
    "sample_image",
    "sampling_figure",
    "sampling_locations",
    "sampling_page",
    "stacked_points",
]
