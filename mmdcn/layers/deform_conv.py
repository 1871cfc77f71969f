"""Deformable convolution as layers, with and without their own offset branch.

========================= ======================= ========================
layer                     forward                 short name in configs
========================= ======================= ========================
DeformConv2d              ``(x, offset)``
ModulatedDeformConv2d     ``(x, offset, mask)``
DeformConv2dPack          ``(x)``                 ``DCN``
ModulatedDeformConv2dPack ``(x)``                 ``DCNv2``
========================= ======================= ========================

Constructor arguments, parameter names and initial values are those of the layers of the same name
in ``mmcv.ops``, so that configs, checkpoints and seeds carry over. Nothing here needs mmcv.

The same four over one and over three dimensions are in :mod:`mmdcn.layers.deform_conv_nd`.
"""

import functools
import logging
from typing import Any

from torch import nn

from mmdcn.layers._deform_conv_base import (
    DeformConv,
    DeformConvBase,
    DeformConvPack,
    ModulatedDeformConv,
    ModulatedDeformConvPack,
    OffsetBranch,
)
from mmdcn.ops import deform_conv2d

_logger = logging.getLogger("mmdcn")


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


class _Over2d(DeformConvBase):
    """Two dimensions, with the arguments of old configs, which name layers for images only."""

    rank, _function, _conv = 2, staticmethod(deform_conv2d), nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int | None = None,
        *,
        deformable_groups: int | None = None,
    ) -> None:
        if deformable_groups is not None:
            if deform_groups not in (1, deformable_groups):
                raise ValueError(
                    "deformable_groups: the former name of deform_groups, expected only one of "
                    f"them, got {deformable_groups} beside deform_groups={deform_groups}"
                )
            _warn_once("deformable_groups is the former name of deform_groups; please rename it.")
            deform_groups = deformable_groups
        if im2col_step is not None:
            _warn_once("im2col_step is ignored: a batch of any size is processed at once.")
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deform_groups,
            bias,
        )


def accept_old_keys_in_parent(parent: nn.Module, name: str, layer: nn.Module) -> None:
    """Let checkpoints load in which the offset branch is beside its layer, not inside.

    Before version 2, ``layer2.0.conv2.conv_offset.weight`` was ``layer2.0.conv2_offset.weight``.
    Only the parent's part of a state dict holds that key: a layer is shown what begins with its
    own name. So torch has to call this wherever a module becomes part of another, which the
    plugin sees to (:mod:`mmdcn.engine.old_keys`).
    """
    if isinstance(layer, OffsetBranch):
        parent.register_load_state_dict_pre_hook(functools.partial(_rename_old_keys, name))


def _rename_old_keys(
    name: str, parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    if hasattr(parent, f"{name}_offset"):
        return  # The key is another module's own.
    for parameter in ("weight", "bias"):
        old_key = f"{prefix}{name}_offset.{parameter}"
        new_key = f"{prefix}{name}.conv_offset.{parameter}"
        if old_key in state_dict and new_key not in state_dict:
            state_dict[new_key] = state_dict.pop(old_key)


class DeformConv2d(DeformConv, _Over2d):
    """Deformable convolution (arXiv 1703.06211, eq. 2), at offsets that the caller gives.

    Args:
        in_channels: channels of the input, C.
        out_channels: channels of the output, Co.
        kernel_size: height and width of the kernel, kh × kw.
        stride: step between output positions, in input pixels.
        padding: zeros that surround the input, in pixels.
        dilation: distance between the taps of the kernel, in pixels.
        groups: number of groups of the convolution; divides C and Co.
        deform_groups: number of offset groups; divides C. The C / deform_groups consecutive
            channels of a group are sampled at the same points.
        bias: whether to add a learnable bias, of shape (Co,), to the output.
        im2col_step: accepted for the sake of old configs, and ignored.
        deformable_groups: what old configs call ``deform_groups``.

    The weight has the shape (Co, C / groups, kh, kw).

    Raises:
        ValueError: if an argument is out of range, or does not divide the channels.

    Example:
        >>> layer = DeformConv2d(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(1, 8, 32, 32), torch.randn(1, 2 * 9, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """


class DeformConv2dPack(DeformConvPack, DeformConv2d):
    """Deformable convolution that predicts its own offsets: a drop-in for a convolution.

    The offset branch starts at zero, so that a fresh layer equals the plain convolution of the
    same weight. Other arguments and errors are those of :class:`DeformConv2d`.

    Args:
        max_offset: a bound for every offset, in pixels of the input, which offsets approach
            smoothly (by the arc tangent); None sets none.

    Example:
        >>> layer = DeformConv2dPack(8, 16, kernel_size=3, padding=1)
        >>> layer(torch.randn(1, 8, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """


class ModulatedDeformConv2d(ModulatedDeformConv, _Over2d):
    """Modulated deformable convolution (v2, arXiv 1811.11168, eq. 1): each sample is scaled.

    Arguments and errors are those of :class:`DeformConv2d`; ``bias`` defaults to True.

    Example:
        >>> layer = ModulatedDeformConv2d(8, 16, kernel_size=3, padding=1)
        >>> offset, mask = torch.randn(1, 2 * 9, 32, 32), torch.rand(1, 9, 32, 32)
        >>> layer(torch.randn(1, 8, 32, 32), offset, mask).shape
        torch.Size([1, 16, 32, 32])
    """


class ModulatedDeformConv2dPack(ModulatedDeformConvPack, ModulatedDeformConv2d):
    """Modulated deformable convolution that predicts its own offsets and modulation.

    A drop-in for a convolution. The branch starts at zero, where the modulation is sigmoid(0), so
    that a fresh layer equals half the plain convolution of the same weight, or just that with
    ``modulation_scale=2``. Other arguments and errors are those of :class:`ModulatedDeformConv2d`.

    Args:
        modulation_scale: what the sigmoid of the branch is multiplied by, hence the largest
            modulation. 1 is the paper's layer; 2 suits weights of a plain convolution.
        max_offset: as in :class:`DeformConv2dPack`.

    Example:
        >>> layer = ModulatedDeformConv2dPack(8, 16, kernel_size=3, padding=1, modulation_scale=2)
        >>> layer(torch.randn(1, 8, 32, 32)).shape
        torch.Size([1, 16, 32, 32])
    """
