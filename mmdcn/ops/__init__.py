"""Deformable operators: functions on tensors, independent of the detection toolbox."""

from .deform_conv import deform_conv2d

__all__ = ["deform_conv2d"]
