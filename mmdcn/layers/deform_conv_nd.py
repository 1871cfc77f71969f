"""Deformable convolution over one and three dimensions as layers.

They are those of :mod:`mmdcn.layers.deform_conv`, ``DeformConv1d`` to
``ModulatedDeformConv3dPack``; in configs those with their own offset branch are ``DCN1d``,
``DCNv2_1d``, ``DCN3d`` and ``DCNv2_3d``.
"""

from torch import nn

from mmdcn.layers._deform_conv_base import (
    DeformConv,
    DeformConvBase,
    DeformConvPack,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
)
from mmdcn.ops import deform_conv1d, deform_conv3d


class _Over1d(DeformConvBase):
    rank, _function, _conv = 1, staticmethod(deform_conv1d), nn.Conv1d


class _Over3d(DeformConvBase):
    rank, _function, _conv = 3, staticmethod(deform_conv3d), nn.Conv3d


class DeformConv1d(DeformConv, _Over1d):
    """:class:`DeformConv2d` over one dimension, for `x` of shape (N, C, L).

    Arguments and errors are those of :class:`DeformConv2d`, without the last two; `kernel_size`,
    `stride`, `padding` and `dilation` are one number, or a tuple of one.

    Example:
        >>> layer = DeformConv1d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 8, 50), torch.randn(2, 3, 50)).shape
        torch.Size([2, 16, 50])
    """


class DeformConv1dPack(DeformConvPack, DeformConv1d):
    """:class:`DeformConv2dPack` over one dimension.

    Example:
        >>> DeformConv1dPack(8, 16, kernel_size=3, padding=1)(torch.randn(2, 8, 50)).shape
        torch.Size([2, 16, 50])
    """


class ModulatedDeformConv1d(ModulatedDeformConv, _Over1d):
    """:class:`ModulatedDeformConv2d` over one dimension: see :class:`DeformConv1d`.

    Example:
        >>> layer = ModulatedDeformConv1d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(2, 8, 50), torch.randn(2, 3, 50), torch.rand(2, 3, 50)).shape
        torch.Size([2, 16, 50])
    """


class ModulatedDeformConv1dPack(ModulatedDeformConvPack, ModulatedDeformConv1d):
    """:class:`ModulatedDeformConv2dPack` over one dimension.

    Example:
        >>> ModulatedDeformConv1dPack(8, 16, kernel_size=3, padding=1)(torch.randn(2, 8, 50)).shape
        torch.Size([2, 16, 50])
    """


class DeformConv3d(DeformConv, _Over3d):
    """:class:`DeformConv2d` over three dimensions, for `x` of shape (N, C, D, H, W).

    Arguments and errors are those of :class:`DeformConv2d`, without the last two; `kernel_size`,
    `stride`, `padding` and `dilation` are one number, or three for depth, height and width.

    Example:
        >>> layer = DeformConv3d(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.randn(1, 4, 5, 6, 7), torch.randn(1, 3 * 27, 5, 6, 7)).shape
        torch.Size([1, 8, 5, 6, 7])
    """


class DeformConv3dPack(DeformConvPack, DeformConv3d):
    """:class:`DeformConv2dPack` over three dimensions.

    Example:
        >>> DeformConv3dPack(4, 8, kernel_size=3, padding=1)(torch.randn(1, 4, 5, 6, 7)).shape
        torch.Size([1, 8, 5, 6, 7])
    """


class ModulatedDeformConv3d(ModulatedDeformConv, _Over3d):
    """:class:`ModulatedDeformConv2d` over three dimensions: see :class:`DeformConv3d`.

    Example:
        >>> layer = ModulatedDeformConv3d(4, 8, kernel_size=3, padding=1)
        >>> offset, mask = torch.randn(1, 3 * 27, 5, 6, 7), torch.rand(1, 27, 5, 6, 7)
        >>> layer(torch.randn(1, 4, 5, 6, 7), offset, mask).shape
        torch.Size([1, 8, 5, 6, 7])
    """


class ModulatedDeformConv3dPack(ModulatedDeformConvPack, ModulatedDeformConv3d):
    """:class:`ModulatedDeformConv2dPack` over three dimensions.

    Example:
        >>> layer = ModulatedDeformConv3dPack(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.randn(1, 4, 5, 6, 7)).shape
        torch.Size([1, 8, 5, 6, 7])
    """
