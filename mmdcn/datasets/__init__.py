"""Data sets that need no download."""

from .parameters import Parameters, Split
from .shapes import Instance, annotate, rasterize
from .warped_shapes import Scene, contact_sheet, draw_scene, generate
from .warps import ElasticWarp, ProjectiveWarp, draw_warp

__all__ = [
    "ElasticWarp",
    "Instance",
    "Parameters",
    "ProjectiveWarp",
    "Scene",
    "Split",
    "annotate",
    "contact_sheet",
    "draw_scene",
    "draw_warp",
    "generate",
    "rasterize",
]
