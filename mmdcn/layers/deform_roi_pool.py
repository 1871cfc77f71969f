"""Deformable RoI pooling as layers, with and without their own offset branch.

========================== =========================
layer                      forward
========================== =========================
DeformRoIPool              ``(x, rois, offset=None)``
DeformRoIPoolPack          ``(x, rois)``
ModulatedDeformRoIPoolPack ``(x, rois)``
========================== =========================

Constructor arguments, parameter names and initial values are those of the layers of the same name
in ``mmcv.ops``, so that configs, checkpoints and seeds carry over. Nothing here needs mmcv.
"""

from typing import Any

from torch import Tensor, nn

from mmdcn.layers._checks import NamedArguments, check_int, check_pair
from mmdcn.ops import deform_roi_pool


class DeformRoIPool(NamedArguments, nn.Module):
    """Deformable RoI pooling (arXiv 1703.06211, section 2.2), at offsets that the caller gives.

    Args:
        output_size: height and width of the result, in bins.
        spatial_scale: pixels of the features for each pixel of the image.
        sampling_ratio: points of a bin along each dimension; 0 takes one to a pixel.
        gamma: what the offsets are multiplied by.
        position_sensitive: whether each bin pools channels of its own, as
            :func:`mmdcn.ops.deform_roi_pool` has it.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> rois = torch.tensor([[0, 4.0, 4.0, 28.0, 20.0]])
        >>> layer = DeformRoIPool(7, spatial_scale=0.5)
        >>> layer(torch.randn(1, 8, 16, 16), rois, torch.randn(1, 2, 7, 7)).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        position_sensitive: bool = False,
    ) -> None:
        # Not super(): the toolbox's variants of these layers have mmcv's layer as a second base
        # (see mmdcn.plugin), and super() would then reach its constructor.
        nn.Module.__init__(self)
        self.output_size = check_pair("output_size", output_size, 1)
        self.spatial_scale = float(spatial_scale)
        if not self.spatial_scale > 0:
            raise ValueError(f"spatial_scale: expected a positive number, got {spatial_scale!r}")
        self.sampling_ratio = int(sampling_ratio)
        self.gamma = float(gamma)
        self.position_sensitive = position_sensitive

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None = None) -> Tensor:
        """Pool the features of each RoI.

        Args:
            input: features of shape (N, C, H, W).
            rois: shape (R, 5): number of the image, then x1, y1, x2, y2 in pixels of the image.
            offset: shape (R, 2 * deform_groups, kh, kw), in fractions of the RoI's size: for each
                offset group x, then y. None is zero.

        Returns:
            Tensor of shape (R, Co, kh, kw); Co is C, or C / (kh * kw) if position-sensitive.
        """
        return deform_roi_pool(
            input,
            rois,
            offset,
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.gamma,
            self.position_sensitive,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, gamma={self.gamma}, "
            f"position_sensitive={self.position_sensitive}"
        )


class DeformRoIPoolPack(DeformRoIPool):
    """Deformable RoI pooling that predicts its own offsets: a drop-in for RoI Align.

    The RoI is first pooled without offsets; fully connected layers predict them from the result.
    The last of these starts at zero, so that a fresh layer equals RoI Align.

    Args:
        output_channels: channels of the result, Co.
        deform_fc_channels: width of the fully connected layers.

    The other arguments and errors are those of :class:`DeformRoIPool`.

    Example:
        >>> rois = torch.tensor([[0, 4.0, 4.0, 28.0, 20.0]])
        >>> layer = DeformRoIPoolPack(7, output_channels=8, deform_fc_channels=64)
        >>> layer(torch.randn(1, 8, 16, 16), rois).shape
        torch.Size([1, 8, 7, 7])
    """

    offset_branches = ("offset_fc.4",)

    def __init__(
        self,
        output_size: int | tuple[int, int],
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        *,
        position_sensitive: bool = False,
    ) -> None:
        super().__init__(
            output_size,
            spatial_scale,
            sampling_ratio,
            gamma,
            position_sensitive=position_sensitive,
        )
        check_int("output_channels", output_channels)
        check_int("deform_fc_channels", deform_fc_channels)
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        bins = self.output_size[0] * self.output_size[1]
        self.offset_fc = nn.Sequential(
            nn.Linear(bins * output_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(deform_fc_channels, 2 * bins),
        )
        self.init_offset()

    def init_offset(self) -> None:
        """Set the last layer of the branch to zero: the bins then are where RoI Align has them."""
        nn.init.zeros_(self.offset_fc[-1].weight)
        nn.init.zeros_(self.offset_fc[-1].bias)

    def init_weights(self) -> None:
        """Zero the offsets again, after mmengine has initialised every ``nn.Linear``."""
        self.init_offset()

    def _pool_twice(self, input: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """The branches' input, of shape (R, Co * kh * kw), and the RoIs pooled at offsets."""
        regular = super().forward(input, rois)
        if regular.shape[1] != self.output_channels:
            raise ValueError(
                f"input: expected channels that give {self.output_channels} in the output, the "
                f"layer's output_channels, got {regular.shape[1]} from shape {tuple(input.shape)}"
            )
        seen = regular.flatten(1)
        offset = self.offset_fc(seen).view(-1, 2, *self.output_size)
        return seen, super().forward(input, rois, offset)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `input` of shape (N, C, H, W) at `rois` of shape (R, 5) to (R, Co, kh, kw)."""
        return self._pool_twice(input, rois)[1]


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Modulated deformable RoI pooling (v2, arXiv 1811.11168, eq. 2): each bin is scaled.

    A second branch predicts the modulation, a sigmoid; it starts at zero, so that a fresh layer
    equals half RoI Align. Arguments and errors are those of :class:`DeformRoIPoolPack`.

    Example:
        >>> rois = torch.tensor([[0, 4.0, 4.0, 28.0, 20.0]])
        >>> layer = ModulatedDeformRoIPoolPack(7, output_channels=8, deform_fc_channels=64)
        >>> layer(torch.randn(1, 8, 16, 16), rois).shape
        torch.Size([1, 8, 7, 7])
    """

    offset_branches = ("offset_fc.4", "mask_fc.2")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bins = self.output_size[0] * self.output_size[1]
        self.mask_fc = nn.Sequential(
            nn.Linear(bins * self.output_channels, self.deform_fc_channels),
            nn.ReLU(inplace=True),
            nn.Linear(self.deform_fc_channels, bins),
            nn.Sigmoid(),
        )
        self.init_mask()

    def init_offset(self) -> None:
        """Set the last layers of both branches to zero, as far as they are built."""
        super().init_offset()
        if hasattr(self, "mask_fc"):
            self.init_mask()

    def init_mask(self) -> None:
        """Set the last layer of the modulation's branch to zero: all bins are scaled by a half."""
        nn.init.zeros_(self.mask_fc[2].weight)
        nn.init.zeros_(self.mask_fc[2].bias)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `input` of shape (N, C, H, W) at `rois` of shape (R, 5) to (R, Co, kh, kw)."""
        seen, pooled = self._pool_twice(input, rois)
        return pooled * self.mask_fc(seen).view(-1, 1, *self.output_size)
