"""Deformable convolution by the names that configs give it."""

from mmdcn import layers

LAYER_TYPES = {
    "DCN": layers.DeformConv2dPack,
    "DCNv2": layers.ModulatedDeformConv2dPack,
    "DeformConv2d": layers.DeformConv2d,
    "DeformConv2dPack": layers.DeformConv2dPack,
    "ModulatedDeformConv2d": layers.ModulatedDeformConv2d,
    "ModulatedDeformConv2dPack": layers.ModulatedDeformConv2dPack,
}
