"""mmdet's own deformable configs: found by what they build, and each checked against mmcv."""

from mmdcn.zoo.checking import (
    IMAGE_SIZE,
    LARGER_IMAGE_SIZE,
    TOLERANCES,
    Checked,
    check,
    sweep,
)
from mmdcn.zoo.finding import FOLDER, Found, find, operators
from mmdcn.zoo.report import table

__all__ = [
    "FOLDER",
    "IMAGE_SIZE",
    "LARGER_IMAGE_SIZE",
    "TOLERANCES",
    "Checked",
    "Found",
    "check",
    "find",
    "operators",
    "sweep",
    "table",
]
