"""Decoders of RoI heads, for a batch of images, and an extractor without control flow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from . import operators
from .decoding import Detections, Suppression, at, candidates, check_coder, decode
from .operators import UNUSED
from .refusals import ExportError, inherits

__all__ = ["Extractor", "RoIHeadDecoder", "replace_extractors"]


# -------------------------------------------------------------------------------------- extractors


class Extractor(nn.Module):
    """A RoI extractor whose shapes do not depend on the levels of its boxes.

    It computes what it wraps. RoIs whose image has the number -1 are not pooled.
    """

    def __init__(self, extractor: SingleRoIExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_inputs = extractor.num_inputs

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> Tensor:
        levels = self.extractor.map_roi_levels(rois, len(features))
        # Boxes without area have no level for `long()` to find.
        levels = torch.where(rois[:, 0] < 0, -1, levels)
        layer = self.extractor.roi_layers[0]
        return operators.multi_level_roi_align(
            list(features),
            rois,
            levels,
            list(layer.output_size),
            [float(layer.spatial_scale) for layer in self.extractor.roi_layers],
            layer.sampling_ratio,
            layer.aligned,
        )


def replace_extractors(roi_head: nn.Module) -> None:
    """Put an :class:`Extractor` in the place of each extractor of a RoI head.

    Raises:
        ExportError: one of them is of another kind than mmdet's with a single level, or pools by
            something else than RoI Align.
    """
    # Not `named_children`, as one that two branches share has two names.
    extractors = {
        name: module
        for name, module in roi_head._modules.items()
        if name.endswith("_roi_extractor") and not isinstance(module, Extractor)
    }
    for name, module in extractors.items():
        where = f"model.roi_head.{name}"
        if not inherits(module, SingleRoIExtractor, ("forward", "map_roi_levels")):
            raise ExportError(
                f"{where}: expected mmdet's SingleRoIExtractor, got {type(module).__name__}"
            )
        for layer in module.roi_layers:
            if not isinstance(layer, RoIAlign) or layer.pool_mode != "avg":
                what = type(layer).__name__ if list(layer.children()) else layer
                raise ExportError(
                    f"{where}: {what} has no counterpart among ONNX's standard operators; "
                    "RoIAlign with pool_mode='avg' has"
                )
    for name, module in extractors.items():
        setattr(roi_head, name, Extractor(module))


# ---------------------------------------------------------------------------------------- decoding


class RoIHeadDecoder:
    """``StandardRoIHead.predict``, with ``BBoxHead``'s and ``FCNMaskHead``'s decoding.

    Args:
        roi_head: mmdet's standard one, with its extractors replaced.

    Raises:
        ExportError: it, or one of its heads, decodes in a way of its own, or has settings that are
            not followed.
    """

    def __init__(self, roi_head: nn.Module) -> None:
        where = "model.roi_head"
        methods = ("predict", "predict_bbox", "predict_mask", "_bbox_forward", "_mask_forward")
        _check(roi_head, StandardRoIHead, methods, where)
        own = ("predict_by_feat", "_predict_by_feat_single")
        _check(roi_head.bbox_head, BBoxHead, own, f"{where}.bbox_head")
        if roi_head.with_mask:
            _check(roi_head.mask_head, FCNMaskHead, own, f"{where}.mask_head")
        head = roi_head.bbox_head
        check_coder(head.bbox_coder, f"{where}.bbox_head")
        if head.custom_cls_channels:
            raise ExportError(
                f"{where}.bbox_head.loss_cls: {type(head.loss_cls).__name__} is not supported"
            )
        if not (head.with_cls and head.with_reg):
            raise ExportError(f"{where}.bbox_head: expected both with_cls and with_reg")
        settings: Mapping = roi_head.test_cfg
        self.roi_head = roi_head
        self.score_thr = settings["score_thr"]
        self.suppression = Suppression.of(settings, "model.test_cfg.rcnn")

    def boxes(
        self, features: Sequence[Tensor], proposals: Detections, image_sizes: Tensor
    ) -> Detections:
        """Detections from proposals.

        Args:
            features: of each level, (N, C, H, W).
            proposals: of the first stage.
            image_sizes: (N, 2), height and width without padding.
        """
        head = self.roi_head.bbox_head
        count = proposals.boxes.shape[1]
        results = self.roi_head._bbox_forward(features, _rois(proposals))
        # From here on (N, P, …), of P proposals.
        scores = results["cls_score"].softmax(-1)[:, :-1].unflatten(0, (-1, count))
        boxes = results["bbox_pred"].unflatten(1, (-1, 4)).unflatten(0, (-1, count))
        variants = boxes.shape[2]
        priors = proposals.boxes[:, :, None].expand(-1, -1, variants, -1)
        boxes = decode(head.bbox_coder, priors.flatten(1, 2), boxes.flatten(1, 2), image_sizes)
        # Classes are the groups of suppression: (N, classes or 1, P, 4) and (N, classes, P).
        boxes = boxes.unflatten(1, (-1, variants)).transpose(1, 2)
        used = (proposals.scores > UNUSED)[:, :, None]
        scores = candidates(scores, used & (scores > self.score_thr)).transpose(1, 2)
        kept, places = self.suppression(boxes, scores)
        own = places if variants > 1 else places % count
        return Detections(at(boxes.flatten(1, 2), own), kept, places // count)

    def masks(self, features: Sequence[Tensor], detections: Detections) -> Tensor:
        """Probabilities (N, K, height, width) of the mask in each box, zero in unused places."""
        masks = self.roi_head._mask_forward(features, _rois(detections))["mask_preds"]
        if masks.shape[1] > 1:
            labels = detections.labels.flatten()[:, None, None, None]
            masks = masks.gather(1, labels.expand(-1, -1, *masks.shape[2:]))
        masks = masks[:, 0].sigmoid().unflatten(0, (-1, detections.boxes.shape[1]))
        return torch.where((detections.scores > UNUSED)[:, :, None, None], masks, 0.0)


def _check(module: nn.Module, ancestor: type, methods: Sequence[str], where: str) -> None:
    if not inherits(module, ancestor, methods):
        raise ExportError(
            f"{where}: expected mmdet's {ancestor.__name__}, or one that decodes as it does, got "
            f"{type(module).__name__}; raw outputs of a StandardRoIHead can be written (--raw)"
        )


def _rois(detections: Detections) -> Tensor:
    """(N · K, 5): the image's number, or -1 in unused places, and the box."""
    images = torch.arange(detections.boxes.shape[0], device=detections.boxes.device)
    images = torch.where(detections.scores > UNUSED, images[:, None], -1)
    rois = torch.cat([images[:, :, None].to(detections.boxes.dtype), detections.boxes], dim=2)
    return rois.flatten(0, 1)
