"""DCNv3 and DCNv4 as layers: drop-ins for a convolution, as ``dcn=`` of a backbone builds it.

Both project the input by a linear layer, add up samples of it in each group of channels, and
project the result: a depth-wise and a point-wise step instead of a dense kernel. Parameter names
are those of InternImage's ``DCNv3`` and of ``DCNv4`` by its authors, so that their checkpoints
load; what these call ``channels``, ``pad`` and ``group`` is ``in_channels``, ``padding`` and
``deform_groups`` here, as in the other layers. Unlike theirs, these take and give (N, C, H, W), may
change the number of channels, and may have a stride.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdcn.layers._bounded_offsets import bounded, check_max_offset
from mmdcn.layers._checks import NamedArguments, check_channels, check_input, check_pair
from mmdcn.layers._deform_conv_base import predict, weight_dtype
from mmdcn.ops import dcnv3, dcnv4


class _DeformAggregateBase(NamedArguments, nn.Module):
    """The arguments and geometry that both layers have in common."""

    max_offset: float | None = None  # for layers that were pickled before the argument existed

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int = 4,
        *,
        offset_scale: float = 1.0,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        max_offset: float | None = None,
    ) -> None:
        super().__init__()
        check_max_offset(max_offset)
        self.max_offset = max_offset
        check_channels(in_channels, out_channels, groups, deform_groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = check_pair("kernel_size", kernel_size, 1)
        self.stride = check_pair("stride", stride, 1)
        self.padding = check_pair("padding", padding, 0)
        self.dilation = check_pair("dilation", dilation, 1)
        self.groups = groups
        self.deform_groups = deform_groups
        self.offset_scale = float(offset_scale)
        self.center_feature_scale = center_feature_scale
        self.remove_center = remove_center
        taps = self.kernel_size[0] * self.kernel_size[1]
        if remove_center and (taps % 2 == 0 or taps == 1):
            raise ValueError(
                "kernel_size: expected odd numbers and more than one tap where remove_center, "
                f"got {kernel_size!r}"
            )
        self.taps = taps - int(remove_center)
        # Read by code that handles convolutions of any kind, such as mmcv's ConvModule.
        self.transposed = False
        self.output_padding = (0, 0)
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(
                torch.zeros(deform_groups, in_channels)
            )
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(deform_groups))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, deform_groups={self.deform_groups}, "
            f"offset_scale={self.offset_scale}, "
            f"center_feature_scale={self.center_feature_scale}, "
            f"remove_center={self.remove_center}"
            + (self.max_offset is not None)
            * f", max_offset={self.max_offset}"
        )

    def _bounded(self, offset: Tensor) -> Tensor:
        """The offsets such that `offset_scale` takes none beyond `max_offset` pixels."""
        if self.max_offset is None or self.offset_scale == 0:
            return offset
        return bounded(offset, self.max_offset / abs(self.offset_scale))

    def _projection(self, out_channels: int, bias: bool = True) -> nn.Linear:
        """A linear layer from the layer's input channels, group by group."""
        if self.groups == 1:
            return nn.Linear(self.in_channels, out_channels, bias)
        return _GroupedLinear(self.in_channels, out_channels, bias, self.groups)

    def _depthwise(self, kernel_size: int | tuple[int, int] | None) -> nn.Conv2d:
        """A depth-wise convolution whose output has the height and width of the layer's."""
        kernel = self.kernel_size if kernel_size is None else kernel_size
        kernel = check_pair("dw_kernel_size", kernel, 1)
        # The padding grows with the kernel, so that the output keeps its size.
        larger = tuple(
            dil * (k - own) for dil, k, own in zip(self.dilation, kernel, self.kernel_size)
        )
        padding = tuple(pad + more // 2 for pad, more in zip(self.padding, larger))
        if any(more % 2 for more in larger) or min(padding) < 0:
            raise ValueError(
                f"dw_kernel_size: expected a kernel that differs by an even number from "
                f"kernel_size={self.kernel_size}, and not by more than padding={self.padding} on "
                f"each side, got {kernel_size!r}"
            )
        channels = self.in_channels
        return nn.Conv2d(
            channels, channels, kernel, self.stride, padding, self.dilation, groups=channels
        )

    @property
    def _geometry(self) -> tuple:
        """The arguments that follow the tensors in calls of the functions."""
        return (
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.deform_groups,
            self.offset_scale,
            self.remove_center,
        )

    def _at_middles(self, x: Tensor) -> Tensor:
        """`x`, (N, H, W, C), at or next to the kernel's middle, for each output position."""
        for d in range(2):
            length, reach = x.shape[1 + d], self.dilation[d] * (self.kernel_size[d] - 1)
            out_length = (length + 2 * self.padding[d] - reach - 1) // self.stride[d] + 1
            first = reach // 2 - self.padding[d]
            if (out_length, self.stride[d], first) == (length, 1, 0):
                continue
            middles = torch.arange(out_length, device=x.device) * self.stride[d] + first
            x = x.index_select(1 + d, middles.clamp(0, length - 1))
        return x

    def _mix_in_middle(self, aggregated: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Blend in the projected input itself, where the layer has center_feature_scale."""
        if not self.center_feature_scale:
            return aggregated
        scale = F.linear(
            seen, self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        ).sigmoid()
        scale = scale.repeat_interleave(self.in_channels // self.deform_groups, dim=-1)
        return torch.lerp(aggregated, self._at_middles(value).to(aggregated.dtype), scale)


def _as_input(output: Tensor, input: Tensor) -> Tensor:
    """`output`, (N, H, W, C), as (N, C, H, W) in the layout of the layer's input."""
    output = output.permute(0, 3, 1, 2)
    last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _GroupedLinear(nn.Linear):
    """A linear layer in groups of channels, as the groups of a 1×1 convolution, on (…, C)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool, groups: int) -> None:
        super().__init__(in_channels // groups, out_channels, bias)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        apart = x.unflatten(-1, (self.groups, -1))
        weight = self.weight.unflatten(0, (self.groups, -1))
        output = torch.einsum("...gi,goi->...go", apart, weight).flatten(-2)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class _ToChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class DCNv3(_DeformAggregateBase):
    """Deformable convolution v3 (InternImage, arXiv 2211.05778, eq. 2).

    Offsets and modulations come from a depth-wise convolution of the input, layer normalisation and
    GELU; a softmax over the taps of each group normalises the modulations. Both start at zero: a
    fresh layer averages the taps of the regular grid.

    Args:
        in_channels: channels of the input, C.
        out_channels: channels of the output, Co.
        kernel_size: height and width of the kernel, kh × kw.
        stride: step between output positions, in input pixels.
        padding: zeros that surround the input, in pixels.
        dilation: distance between the taps of the kernel, in pixels.
        groups: number of groups of the two projections, as those of a convolution; divides C and
            Co. What is projected in a group comes from its own channels alone; offsets and
            modulations come from all.
        deform_groups: number of groups, each of which samples and modulates by itself; divides C.
        bias: whether the output projection has a bias.
        offset_scale: what the kernel and its offsets are multiplied by.
        dw_kernel_size: kernel size of the depth-wise convolution; None takes `kernel_size`.
        center_feature_scale: whether to blend in the projected input at the middle of the kernel,
            by a sigmoid for each group.
        remove_center: whether the kernel's middle tap is left out.
        max_offset: a bound for every offset, in pixels of the input and after `offset_scale`, which
            offsets approach smoothly (by the arc tangent); None sets none.

    Raises:
        ValueError: if an argument is out of range, or does not divide the channels.

    Example:
        >>> layer = DCNv3(16, 32, kernel_size=3, padding=1, deform_groups=4)
        >>> layer(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 8, 8])
    """

    offset_branches = ("offset", "mask")

    def __init__(
        self,
        *args: Any,
        bias: bool = True,
        dw_kernel_size: int | tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        in_channels, samples = self.in_channels, self.deform_groups * self.taps
        self.dw_conv = nn.Sequential(
            self._depthwise(dw_kernel_size),
            nn.Sequential(_ToChannelsLast(), nn.LayerNorm(in_channels, eps=1e-6)),
            nn.GELU(),
        )
        self.offset = nn.Linear(in_channels, 2 * samples)
        self.mask = nn.Linear(in_channels, samples)
        self.input_proj = self._projection(in_channels)
        self.output_proj = self._projection(self.out_channels, bias)
        self.init_weights()

    def init_weights(self) -> None:
        """Zero offsets, modulations and biases, Glorot's initialisation for the projections."""
        self.init_offset()
        _init_projection(self.input_proj, self.groups)
        _init_projection(self.output_proj, self.groups)

    def init_offset(self) -> None:
        """Set offsets and modulations to zero: all taps of the regular grid then weigh alike."""
        for branch in (self.offset, self.mask):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape (N, C, H, W) to (N, Co, Ho, Wo)."""
        check_input(self, x, 2, weight_dtype(self.offset))
        value = self.input_proj(x.permute(0, 2, 3, 1))
        seen = predict(self.dw_conv, x)
        mask = predict(self.mask, seen).unflatten(-1, (self.deform_groups, self.taps))
        mask = mask.softmax(-1).flatten(-2)
        offset = self._bounded(predict(self.offset, seen))
        aggregated = dcnv3(value, offset, mask, *self._geometry)
        mixed = self._mix_in_middle(aggregated, value, seen)
        return _as_input(self.output_proj(mixed), x)


class DCNv4(_DeformAggregateBase):
    """Deformable convolution v4 (arXiv 2401.06197): modulations that nothing bounds.

    Offsets and modulations come from one linear layer. Offsets start at zero and modulations at
    1 / taps, so that a fresh layer averages the taps of the regular grid, as DCNv3 does. (The
    authors' start at zero, where the layer gives nothing but its bias, and a batch normalisation
    after it has nothing to normalise.)

    Args:
        dw_kernel_size: kernel size of a depth-wise convolution before that linear layer. None
            leaves it out; the linear layer then sees the input in the middle of the kernel.
        without_pointwise: whether both projections are left out; Co is C then.

    The other arguments and the errors are those of :class:`DCNv3`.

    Example:
        >>> layer = DCNv4(16, 32, kernel_size=3, stride=2, padding=1, deform_groups=4)
        >>> layer(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    offset_branches = ("offset_mask",)

    def __init__(
        self,
        *args: Any,
        bias: bool = True,
        dw_kernel_size: int | tuple[int, int] | None = None,
        without_pointwise: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        in_channels, out_channels = self.in_channels, self.out_channels
        if without_pointwise and out_channels != in_channels:
            raise ValueError(
                f"out_channels: expected in_channels={in_channels} where without_pointwise, "
                f"got {out_channels}"
            )
        self.without_pointwise = without_pointwise
        if dw_kernel_size is not None:
            self.offset_mask_dw = self._depthwise(dw_kernel_size)
        # The authors' checkpoints have a multiple of 8 channels.
        self.offset_mask = nn.Linear(in_channels, (3 * self.deform_groups * self.taps + 7) // 8 * 8)
        if not without_pointwise:
            self.value_proj = self._projection(in_channels)
            self.output_proj = self._projection(out_channels, bias)
        self.init_weights()

    def init_weights(self) -> None:
        """Zero offsets and biases, equal modulations, Glorot's initialisation for projections."""
        self.init_offset()
        if not self.without_pointwise:
            _init_projection(self.value_proj, self.groups)
            _init_projection(self.output_proj, self.groups)

    def init_offset(self) -> None:
        """Set offsets to zero and modulations to 1 / taps."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        with torch.no_grad():
            used = self.offset_mask.bias[: 3 * self.deform_groups * self.taps]
            used.view(self.deform_groups, 3, self.taps)[:, 2] = 1 / self.taps

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` of shape (N, C, H, W) to (N, Co, Ho, Wo)."""
        check_input(self, x, 2, weight_dtype(self.offset_mask))
        last = x.permute(0, 2, 3, 1)
        value = last if self.without_pointwise else self.value_proj(last)
        if hasattr(self, "offset_mask_dw"):
            seen = predict(self.offset_mask_dw, x).permute(0, 2, 3, 1)
        else:
            seen = self._at_middles(last)
        offset_mask = predict(self.offset_mask, seen)
        if self.max_offset is not None:
            used = offset_mask[..., : 3 * self.deform_groups * self.taps]
            grouped = used.unflatten(-1, (self.deform_groups, 3 * self.taps))
            offset, mask = grouped.split([2 * self.taps, self.taps], dim=-1)
            offset_mask = torch.cat([self._bounded(offset), mask], dim=-1).flatten(-2)
        output = dcnv4(value, offset_mask, *self._geometry)
        output = self._mix_in_middle(output, value, output)
        return _as_input(output if self.without_pointwise else self.output_proj(output), x)


def _init_projection(projection: nn.Linear, groups: int) -> None:
    for weight in projection.weight.detach().chunk(groups):
        nn.init.xavier_uniform_(weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
