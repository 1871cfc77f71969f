"""Extensions of the toolbox's own models: deformable layers where it offers none."""

from mmdcn.models.convert import build_deformable, convert_to_deformable
from mmdcn.models.fuse import fuse_conv_bn

__all__ = ["build_deformable", "convert_to_deformable", "fuse_conv_bn"]
