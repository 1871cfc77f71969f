"""Deformable convolution as layers, over any number of dimensions: what all of them have in common.

A layer is one of the two convolutions here, with the mix-in of its offset branch where it has one,
and a class that names its dimensions: see :mod:`mmdcn.layers.deform_conv`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmdcn.layers._bounded_offsets import bounded, check_max_offset
from mmdcn.layers._checkpoint_keys import read_other_keys
from mmdcn.layers._checks import NamedArguments, check_channels, check_input, check_numbers
from mmdcn.ops._registration import autocast_is_enabled


class DeformConvBase(NamedArguments, nn.Module):
    """The arguments, parameters and description that all layers have in common."""

    #: The number of spatial dimensions, and the operator and the plain convolution over as many.
    rank: int
    _function: Callable[..., Tensor]
    _conv: type[nn.Module]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
    ) -> None:
        # Not super(): the toolbox's variants of these layers have mmcv's layer as a second base
        # (see mmdcn.plugin), and super() would then reach its constructor.
        nn.Module.__init__(self)

        check_channels(in_channels, out_channels, groups, deform_groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = check_numbers("kernel_size", kernel_size, 1, self.rank)
        self.stride = check_numbers("stride", stride, 1, self.rank)
        self.padding = check_numbers("padding", padding, 0, self.rank)
        self.dilation = check_numbers("dilation", dilation, 1, self.rank)
        self.groups = groups
        self.deform_groups = deform_groups
        # Read by code that handles convolutions of any kind, such as mmcv's ConvModule.
        self.transposed = False
        self.output_padding = (0,) * self.rank

        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deform_groups={self.deform_groups}, "
            f"bias={self.bias is not None}"
        )

    def _deform_conv(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        return type(self)._function(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )


def predict(branch: nn.Module, x: Tensor) -> Tensor:
    """The output of an offset branch, in the precision of its weights even under autocast.

    In bfloat16, an offset of 8 pixels would be off by up to 1/32 of a pixel.
    """
    if not autocast_is_enabled(x.device.type):
        return branch(x)
    with torch.autocast(x.device.type, enabled=False):
        return branch(x.to(weight_dtype(branch) or x.dtype))


def weight_dtype(branch: nn.Module) -> torch.dtype | None:
    """The dtype of a module's weights, which need not be parameters.

    In a replica of ``nn.DataParallel`` they are mere tensors, and so they are in a module whose
    parameters FSDP keeps in one flat tensor.
    """
    for parameter in branch.parameters():
        return parameter.dtype
    for module in branch.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            return weight.dtype
    return None


class OffsetBranch:
    """The convolution that predicts offsets and modulation, as a mix-in of a deformable layer.

    The branch sees the layer's input and has its kernel size, stride, padding and dilation, so
    that its output has the size of the layer's output.
    """

    #: The modules that start at zero, in every layer that has some; ``init_offset`` sets them back.
    offset_branches = ("conv_offset",)

    _version = 2  # mmcv's count for the keys in state dicts; deform_conv.py takes the older ones.

    def _add_offset_branch(self, channels_per_tap: int) -> None:
        self.conv_offset = self._conv(
            self.in_channels,
            self.deform_groups * channels_per_tap * math.prod(self.kernel_size),
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
        )
        read_other_keys(self)

    def init_offset(self) -> None:
        """Set the branch to zero: the kernel then samples its regular grid."""
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)


class DeformConv(DeformConvBase):
    """Deformable convolution v1 over any number of dimensions."""

    def reset_parameters(self) -> None:
        """Draw the weight by He's uniform initialisation (arXiv 1502.01852), and zero the bias."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve `x` at the offset sampling points.

        Args:
            x: input of shape (N, C, H, W), or (N, C, L), or (N, C, D, H, W).
            offset: in pixels, of shape (N, rank * deform_groups * taps, Ho, Wo), with the output's
                dimensions after the channels: for each offset group and each tap, in row-major
                order, one number for each dimension, in the input's order: y then x, or z, y, x.

        Returns:
            Tensor of shape (N, Co, Ho, Wo), with as many dimensions as `x`.
        """
        return self._deform_conv(x, offset, None)


class DeformConvPack(OffsetBranch):
    """The offset branch of v1, as a mix-in."""

    max_offset: float | None = None  # for layers that were pickled before the argument existed

    def __init__(self, *args: Any, max_offset: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_max_offset(max_offset)
        self.max_offset = max_offset
        self._add_offset_branch(channels_per_tap=self.rank)
        self.init_offset()

    def extra_repr(self) -> str:
        bounds = self.max_offset is not None
        return super().extra_repr() + bounds * f", max_offset={self.max_offset}"

    def init_weights(self) -> None:
        """Zero the offset branch again, after mmengine has initialised every convolution."""
        self.init_offset()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape (N, C, H, W) to (N, Co, Ho, Wo), in 1-D and 3-D accordingly."""
        check_input(self, x, self.rank, self.weight.dtype)
        offset = bounded(predict(self.conv_offset, x), self.max_offset)
        return self._deform_conv(x, offset, None)


class ModulatedDeformConv(DeformConvBase):
    """Deformable convolution v2 over any number of dimensions."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        **kwargs: int,
    ) -> None:
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
            **kwargs,
        )

    def reset_parameters(self) -> None:
        """Draw the weight uniformly from ±1 / sqrt(C * taps), and zero the bias."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Initialise again; mmengine calls this on what it builds."""
        self.reset_parameters()

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve `x` at the offset sampling points, each scaled by its modulation.

        Args:
            x, offset: see v1.
            mask: modulation of shape (N, deform_groups * taps, Ho, Wo), with the dimensions of the
                output after the channels, usually in [0, 1].

        Returns:
            Tensor of shape (N, Co, Ho, Wo), with as many dimensions as `x`.
        """
        return self._deform_conv(x, offset, mask)


class ModulatedDeformConvPack(OffsetBranch):
    """The branch of v2 for offsets and modulation, as a mix-in."""

    # Layers that were pickled before the arguments existed have none.
    modulation_scale = 1.0
    max_offset: float | None = None

    def __init__(
        self,
        *args: Any,
        modulation_scale: float = 1.0,
        max_offset: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_max_offset(max_offset)
        self.max_offset = max_offset
        if not isinstance(modulation_scale, int | float) or not 0 < modulation_scale < math.inf:
            raise ValueError(
                f"modulation_scale: expected a number above 0, got {modulation_scale!r}"
            )
        self.modulation_scale = modulation_scale
        self._add_offset_branch(channels_per_tap=self.rank + 1)
        self.init_weights()

    def extra_repr(self) -> str:
        scaled = self.modulation_scale != 1
        bounds = self.max_offset is not None
        return (
            super().extra_repr()
            + scaled * f", modulation_scale={self.modulation_scale}"
            + bounds * f", max_offset={self.max_offset}"
        )

    def init_weights(self) -> None:
        """Initialise the weight again and zero the offset branch; mmengine calls this."""
        super().init_weights()
        self.init_offset()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape (N, C, H, W) to (N, Co, Ho, Wo), in 1-D and 3-D accordingly."""
        check_input(self, x, self.rank, self.weight.dtype)
        # All offsets come first, then the modulation of every tap.
        samples = self.deform_groups * math.prod(self.kernel_size)
        offset, mask = predict(self.conv_offset, x).split([self.rank * samples, samples], dim=1)
        modulation = mask.sigmoid()
        if self.modulation_scale != 1:
            modulation = self.modulation_scale * modulation
        return self._deform_conv(x, bounded(offset, self.max_offset), modulation)
