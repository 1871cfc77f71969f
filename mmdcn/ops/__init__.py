"""Deformable operators: functions on tensors, independent of the detection toolbox."""

from . import _onnx_exporters
from .deform_aggregate import dcnv3, dcnv4
from .deform_conv import deform_conv2d
from .deform_conv_nd import deform_conv1d, deform_conv3d
from .deform_roi_pool import deform_roi_pool

__all__ = [
    "dcnv3",
    "dcnv4",
    "deform_conv1d",
    "deform_conv2d",
    "deform_conv3d",
    "deform_roi_pool",
]

_onnx_exporters.register()
