"""A whole detector that can be traced: from a batch of images to boxes, scores and labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from torch import Tensor, nn

from mmdcn import machine

from .comparison import Matches, Tolerance
from .decoding import Detections
from .dense_heads import decoder_of
from .operators import UNUSED
from .preprocessing import Preprocessing
from .refusals import ExportError, inherits
from .roi_heads import RoIHeadDecoder, replace_extractors

__all__ = ["EndToEnd", "dense_head_of"]


def dense_head_of(detector: nn.Module) -> str:
    """The name of a detector's dense head, which for a two-stage detector is its RPN.

    Raises:
        ExportError: the detector is neither of mmdet's one-stage nor of its two-stage ones.
    """
    if isinstance(detector, TwoStageDetector) and detector.with_rpn:
        return "rpn_head"
    if isinstance(detector, SingleStageDetector):
        return "bbox_head"
    raise ExportError(
        "model: expected a one-stage detector, or a two-stage one with an rpn_head, got "
        f"{type(detector).__name__}"
    )


class EndToEnd(nn.Module):
    """A detector, from images to detections.

    Its inputs are `images`, of shape (N, 3, H, W), as the detector's ``data_preprocessor`` gives
    them, and `image_sizes`, of shape (N, 2) in int64: the height and width of each image without
    its padding. Its outputs have K places for each image, as many as the config's ``max_per_img``:
    `boxes` (N, K, 4) as left, top, right, bottom in pixels of `images`; `scores` (N, K) in
    descending order; `labels` (N, K) in int64; and of a detector of masks, `masks`
    (N, K, height, width), the probabilities within each box. Places that are left have score 0.

    Args:
        detector: of mmdet's one-stage or two-stage detectors.
        with_preprocessing: whether `images` are in uint8, as they are read from files, and
            normalised and padded in here.
        classes: names of the classes, for the file's metadata.

    Raises:
        ExportError: the detector has a part that decodes in a way of its own, or settings that are
            not followed here.
    """

    input_names = ("images", "image_sizes")

    def __init__(
        self,
        detector: nn.Module,
        with_preprocessing: bool = False,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.classes = None if classes is None else list(classes)
        self._dense = dense_head_of(detector)
        kind = TwoStageDetector if self._dense == "rpn_head" else SingleStageDetector
        if not inherits(detector, kind, ("predict",)):
            raise ExportError(
                f"model: {type(detector).__name__} predicts in a way of its own, which has no "
                "counterpart here; its raw outputs can be written (--raw)"
            )
        self.preprocessing = Preprocessing(detector.data_preprocessor)
        self.with_preprocessing = with_preprocessing
        self._decode = decoder_of(getattr(detector, self._dense), f"model.{self._dense}")
        self._second: RoIHeadDecoder | None = None
        if self._dense == "rpn_head" and detector.with_roi_head:
            # Both refuse before anything is changed.
            self._second = RoIHeadDecoder(detector.roi_head)
            replace_extractors(detector.roi_head)
        self.has_masks = self._second is not None and detector.roi_head.with_mask
        last = self._second or self._decode
        self.score_thr = last.score_thr
        self.suppression = last.suppression

    @property
    def output_names(self) -> list[str]:
        return ["boxes", "scores", "labels", *(["masks"] if self.has_masks else [])]

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of itself, as JSON by name."""
        facts: dict[str, Any] = {
            "score_thr": self.score_thr,
            "iou_threshold": self.suppression.iou_threshold,
            "max_per_img": self.suppression.max_per_img,
            "with_preprocessing": self.with_preprocessing,
            "preprocessing": self.preprocessing.settings,
            "versions": machine.versions("mmdcn", "torch", "mmengine", "mmcv", "mmdet"),
        }
        if self.classes is not None:
            facts["classes"] = self.classes
        if self.has_masks:
            facts["mask_thr_binary"] = self.detector.roi_head.test_cfg.mask_thr_binary
        return {f"mmdcn.{name}": json.dumps(value) for name, value in facts.items()}

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of :attr:`output_names`."""
        if self.with_preprocessing:
            images = self.preprocessing(images, image_sizes)
        features = self.detector.extract_feat(images)
        found = self._decode(features, image_sizes)
        if self._second is not None:
            found = self._second.boxes(features, found, image_sizes)
        outputs = _without_unused(found)
        if self.has_masks:
            outputs += (self._second.masks(features, found),)
        return outputs

    def inputs_of(self, data: dict) -> tuple[Tensor, ...]:
        """Its inputs for what a test pipeline gives, collated."""
        sizes = torch.tensor([sample.img_shape[:2] for sample in data["data_samples"]])
        if self.with_preprocessing:
            return self.preprocessing.stack(data["inputs"]), sizes
        return self.detector.data_preprocessor(data, training=False)["inputs"], sizes

    def twice(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A batch of an image and its mirror image."""
        images, sizes = inputs
        return torch.cat([images, images.flip(3)]), sizes.repeat(2, 1)

    def comparison(self, tolerance: Tolerance) -> Matches:
        """What compares results in another runtime with this module's."""
        return Matches(tolerance=tolerance)


def _without_unused(found: Detections) -> tuple[Tensor, ...]:
    used = found.scores > UNUSED
    boxes = torch.where(used[:, :, None], found.boxes, 0.0)
    return boxes, torch.where(used, found.scores, 0.0), torch.where(used, found.labels, 0)
