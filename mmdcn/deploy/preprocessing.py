"""What a detector does with an image before its network: channels, normalisation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.data_preprocessors import DetDataPreprocessor
from torch import Tensor, nn

from .refusals import ExportError, inherits

__all__ = ["Preprocessing"]


class Preprocessing(nn.Module):
    """``DetDataPreprocessor`` for a batch that can be traced.

    Args:
        preprocessor: the detector's.

    Raises:
        ExportError: it is of another kind.
    """

    def __init__(self, preprocessor: nn.Module) -> None:
        super().__init__()
        if not inherits(preprocessor, DetDataPreprocessor, ("forward",)):
            raise ExportError(
                "model.data_preprocessor: expected mmdet's DetDataPreprocessor, got "
                f"{type(preprocessor).__name__}"
            )
        normalizes = preprocessor._enable_normalize
        mean = preprocessor.mean if normalizes else torch.zeros(1, 1, 1)
        std = preprocessor.std if normalizes else torch.ones(1, 1, 1)
        self.register_buffer("mean", mean.clone(), persistent=False)
        self.register_buffer("std", std.clone(), persistent=False)
        self.swaps_channels = preprocessor._channel_conversion
        self.pad_value = preprocessor.pad_value
        self.divisor = preprocessor.pad_size_divisor

    @property
    def settings(self) -> dict[str, Any]:
        """What a program does to an image instead, whose channels are in the order of OpenCV."""
        return {
            "swap_channels": self.swaps_channels,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "pad_value": self.pad_value,
            "pad_size_divisor": self.divisor,
        }

    def stack(self, images: Sequence[Tensor]) -> Tensor:
        """A batch (N, 3, H, W) in uint8 of images (3, h, w) of other sizes."""
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
        for place, image in zip(batch, images):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch

    def forward(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """The network's input.

        Args:
            images: (N, 3, H, W) in uint8, each in the upper left corner of its place.
            image_sizes: (N, 2), their heights and widths.

        Returns:
            (N, 3, H', W') in float32, whose sizes are multiples of the divisor.
        """
        x = (images.flip(1) if self.swaps_channels else images).float()
        x = (x - self.mean) / self.std
        height, width = images.shape[2:]
        rows = torch.arange(height, device=x.device) < image_sizes[:, :1]
        columns = torch.arange(width, device=x.device) < image_sizes[:, 1:]
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]
        x = torch.where(inside, x, float(self.pad_value))
        missing = [-size % self.divisor for size in (width, height)]
        return nn.functional.pad(x, (0, missing[0], 0, missing[1]), value=self.pad_value)
