"""Deformable layers: plain PyTorch modules, which configs can name."""

from mmdcn.layers.deform_aggregate import DCNv3, DCNv4
from mmdcn.layers.deform_conv import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)
from mmdcn.layers.deform_conv_nd import (
    DeformConv1d,
    DeformConv1dPack,
    DeformConv3d,
    DeformConv3dPack,
    ModulatedDeformConv1d,
    ModulatedDeformConv1dPack,
    ModulatedDeformConv3d,
    ModulatedDeformConv3dPack,
)
from mmdcn.layers.deform_roi_pool import (
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformRoIPoolPack,
)

__all__ = [
    "DCNv3",
    "DCNv4",
    "DeformConv1d",
    "DeformConv1dPack",
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformConv3d",
    "DeformConv3dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv1d",
    "ModulatedDeformConv1dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformConv3d",
    "ModulatedDeformConv3dPack",
    "ModulatedDeformRoIPoolPack",
]
