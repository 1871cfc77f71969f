"""What decoders have in common: candidates, boxes within their image, and suppression.

All of it works on a batch of images, with shapes that do not depend on values: what is no candidate
keeps its place, with the score :data:`~.operators.UNUSED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor

from . import operators
from .operators import UNUSED
from .refusals import ExportError

__all__ = [
    "Detections",
    "Suppression",
    "at",
    "candidates",
    "check_coder",
    "clip",
    "decode",
    "large_enough",
    "positive",
]

# Those that shift a box of the prior's kind: others may read the prior's values.
_CODERS = (DeltaXYWHBBoxCoder, DistancePointBBoxCoder)


class Detections(NamedTuple):
    """Boxes of a batch of images.

    Attributes:
        boxes: (N, K, 4): left, top, right, bottom in pixels of the network's input.
        scores: (N, K), in descending order; :data:`~.operators.UNUSED` in places that are left.
        labels: (N, K) in int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def positive(settings: Mapping, key: str, where: str) -> int:
    """A number of places, which the shape of an output follows from.

    Raises:
        ExportError: it is not given, or is no positive number, which means "all" to mmdet.
    """
    value = settings.get(key, -1)
    if not isinstance(value, int) or value <= 0:
        raise ExportError(f"{where}.{key}: expected a positive number of boxes, got {value!r}")
    return value


# ------------------------------------------------------------------------------------------- boxes


def check_coder(coder: Any, where: str) -> None:
    """Raise ExportError for a way to encode boxes that :func:`decode` does not know."""
    if getattr(type(coder), "decode", None) not in [known.decode for known in _CODERS]:
        names = " or ".join(known.__name__ for known in _CODERS)
        raise ExportError(f"{where}.bbox_coder: expected {names}, got {type(coder).__name__}")


def decode(coder: Any, priors: Tensor, encoded: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes from what a head predicts, clipped to each image as the coder says.

    Args:
        coder: of the head.
        priors: (N, M, 2 or 4), points or boxes.
        encoded: (N, M, 4).
        image_sizes: (N, 2), height and width without padding.

    Returns:
        (N, M, 4).
    """
    # Without `max_shape` it is one way for all images.
    boxes = coder.decode(priors.reshape(-1, priors.shape[-1]), encoded.reshape(-1, 4))
    boxes = get_box_tensor(boxes).reshape(encoded.shape)
    return clip(boxes, image_sizes) if coder.clip_border else boxes


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """What lies within the images of boxes (N, M, 4); `image_sizes` (N, 2): height and width."""
    limits = image_sizes.flip(1).repeat(1, 2).to(boxes.dtype)[:, None]
    return torch.minimum(boxes.clamp(min=0), limits)


def at(values: Tensor, indices: Tensor) -> Tensor:
    """Those of `values` (N, M, D) that `indices` (N, K) choose in each image: (N, K, D)."""
    return values.gather(1, indices[:, :, None].expand(-1, -1, values.shape[2]))


def large_enough(boxes: Tensor, min_size: float) -> Tensor:
    """Which boxes (..., 4) are both wider and higher than `min_size`, or all where it is < 0."""
    width, height = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    return (width > min_size) & (height > min_size) if min_size >= 0 else width == width


# ------------------------------------------------------------------------------------- suppression


@dataclass(frozen=True)
class Suppression:
    """Non-maximum suppression as a config's ``nms`` says, and how many boxes it leaves.

    Attributes:
        iou_threshold: a box suppresses those of lower scores that it overlaps by more.
        class_agnostic: whether it does so in all groups.
        max_per_img: how many boxes are left.
    """

    iou_threshold: float
    class_agnostic: bool
    max_per_img: int

    @classmethod
    def of(cls, settings: Mapping, where: str) -> Suppression:
        """Read it from the `test_cfg` of a head.

        Raises:
            ExportError: the config asks for another kind, such as soft NMS.
        """
        nms = dict(settings.get("nms") or {})
        kind = nms.pop("type", "nms")
        threshold = nms.pop("iou_threshold", None)
        class_agnostic = nms.pop("class_agnostic", False)
        # mmcv splits what is large, for memory's sake.
        nms.pop("split_thr", None)
        if kind != "nms" or threshold is None or nms:
            raise ExportError(
                f"{where}.nms: expected dict(type='nms', iou_threshold=...), also with "
                f"class_agnostic, got {dict(settings.get('nms') or {})}"
            )
        return cls(float(threshold), bool(class_agnostic), positive(settings, "max_per_img", where))

    def __call__(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes that are left.

        Args:
            boxes: (N, G, M, 4), or (N, 1, M, 4) where all groups have the same.
            scores: (N, G, M), :data:`~.operators.UNUSED` where there is no candidate.

        Returns:
            Their scores (N, K) in descending order, and their places (N, K) among G · M.
        """
        kept = operators.nms(*self._groups(boxes, scores), self.iou_threshold, self.max_per_img)
        return operators.select_top_k(kept.flatten(1), self.max_per_img)

    def _groups(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        if not self.class_agnostic:
            return boxes, scores
        every = boxes.expand(-1, scores.shape[1], -1, -1)
        return every.flatten(1, 2)[:, None], scores.flatten(1)[:, None]


def candidates(scores: Tensor, condition: Tensor) -> Tensor:
    """Scores where a condition holds, and :data:`~.operators.UNUSED` elsewhere."""
    return torch.where(condition, scores, UNUSED)
