"""Decoders of RoI heads, for a batch of images, and an extractor without control flow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from mmdcn.layers import DeformRoIPool

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
        if not isinstance(layer, RoIAlign):
            return self._at_every_level(features, rois, levels)
        return operators.multi_level_roi_align(
            list(features),
            rois,
            levels,
            list(layer.output_size),
            [float(layer.spatial_scale) for layer in self.extractor.roi_layers],
            layer.sampling_ratio,
            layer.aligned,
        )

    def _at_every_level(self, features: Sequence[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        """Each RoI is pooled at all levels and one is taken: a layer of its own has no other way.

        It costs as many times as much as there are levels.
        """
        somewhere = torch.cat([rois[:, :1].clamp(min=0), rois[:, 1:]], dim=1)
        pooled: Tensor | float = 0.0
        for level, (x, layer) in enumerate(zip(features, self.extractor.roi_layers)):
            own = levels[:, None, None, None] == level
            pooled = torch.where(own, layer(x, somewhere), pooled)
        return pooled


def replace_extractors(roi_head: nn.Module) -> None:
    """Put an :class:`Extractor` in the place of each extractor of a RoI head.

    Raises:
        ExportError: one of them is of another kind than mmdet's with a single level, or pools by
            something else than RoI Align or deformable RoI pooling.
    """
    places = [place for place in _extractors(roi_head) if not isinstance(place[2], Extractor)]
    for _, _, module, where in places:
        if not inherits(module, SingleRoIExtractor, ("forward", "map_roi_levels")):
            raise ExportError(
                f"{where}: expected mmdet's SingleRoIExtractor, got {type(module).__name__}"
            )
        for layer in module.roi_layers:
            if isinstance(layer, DeformRoIPool):
                continue
            if not isinstance(layer, RoIAlign) or layer.pool_mode != "avg":
                what = type(layer).__name__ if list(layer.children()) else layer
                raise ExportError(
                    f"{where}: {what} has no counterpart among ONNX's standard operators; "
                    "RoIAlign with pool_mode='avg' and deformable RoI pooling have"
                )
    for parent, name, module, _ in places:
        setattr(parent, name, Extractor(module))


def _extractors(roi_head: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module, str]]:
    """The extractors of a RoI head, of each stage: what has each, by which name, and where."""
    # Not `named_children`, as one that two branches share has two names.
    for name, module in roi_head._modules.items():
        if not name.endswith("_roi_extractor"):
            continue
        where = f"model.roi_head.{name}"
        if not isinstance(module, nn.ModuleList):
            yield roi_head, name, module, where
            continue
        for stage, of_stage in enumerate(module):
            yield module, str(stage), of_stage, f"{where}[{stage}]"


# ---------------------------------------------------------------------------------------- decoding


class RoIHeadDecoder:
    """``predict`` of mmdet's standard RoI head and of its cascade.

    Their boxes and masks are decoded as ``BBoxHead`` and ``FCNMaskHead`` do it. A standard head is
    a cascade of one stage.

    Args:
        roi_head: one of these, with its extractors replaced.

    Raises:
        ExportError: it, or one of its heads, decodes in a way of its own, or has settings that are
            not followed.
    """

    def __init__(self, roi_head: nn.Module) -> None:
        where = "model.roi_head"
        methods = ("predict", "predict_bbox", "predict_mask", "_bbox_forward", "_mask_forward")
        is_cascade = isinstance(roi_head, CascadeRoIHead)
        if is_cascade:
            _check(roi_head, CascadeRoIHead, (*methods, "_refine_roi"), where)
        else:
            _check(roi_head, StandardRoIHead, methods, where)

        def stages(name: str) -> list[tuple[nn.Module, str]]:
            heads = getattr(roi_head, name)
            if not is_cascade:
                return [(heads, f"{where}.{name}")]
            return [(head, f"{where}.{name}[{stage}]") for stage, head in enumerate(heads)]

        def forwards(function: Callable) -> list[Callable]:
            if not is_cascade:
                return [function]
            return [functools.partial(function, stage) for stage in range(roi_head.num_stages)]

        for head, place in stages("bbox_head"):
            _check_box_head(head, place)
        if roi_head.with_mask:
            for head, place in stages("mask_head"):
                _check(head, FCNMaskHead, _OF_A_HEAD, place)
        settings: Mapping = roi_head.test_cfg
        self._box_heads = [head for head, _ in stages("bbox_head")]
        self._box_forwards = forwards(roi_head._bbox_forward)
        self._mask_forwards = forwards(roi_head._mask_forward) if roi_head.with_mask else []
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
        count = proposals.boxes.shape[1]
        logits, encoded = [], None
        for stage, forward in enumerate(self._box_forwards):
            if stage > 0:
                head = self._box_heads[stage - 1]
                refined = _refined(head, proposals.boxes, logits[-1], encoded, image_sizes)
                proposals = proposals._replace(boxes=refined)
            results = forward(features, _rois(proposals))
            # From here on (N, P, …), of P proposals.
            logits.append(results["cls_score"].unflatten(0, (-1, count)))
            encoded = results["bbox_pred"].unflatten(1, (-1, 4)).unflatten(0, (-1, count))
        scores = _mean(logits).softmax(-1)[:, :, :-1]
        variants = encoded.shape[2]
        priors = proposals.boxes[:, :, None].expand(-1, -1, variants, -1)
        coder = self._box_heads[-1].bbox_coder
        boxes = decode(coder, priors.flatten(1, 2), encoded.flatten(1, 2), image_sizes)
        # Classes are the groups of suppression: (N, classes or 1, P, 4) and (N, classes, P).
        boxes = boxes.unflatten(1, (-1, variants)).transpose(1, 2)
        used = (proposals.scores > UNUSED)[:, :, None]
        scores = candidates(scores, used & (scores > self.score_thr)).transpose(1, 2)
        kept, places = self.suppression(boxes, scores)
        own = places if variants > 1 else places % count
        return Detections(at(boxes.flatten(1, 2), own), kept, places // count)

    def masks(self, features: Sequence[Tensor], detections: Detections) -> Tensor:
        """Probabilities (N, K, height, width) of the mask in each box, zero in unused places."""
        rois = _rois(detections)
        labels = detections.labels.flatten()[:, None, None, None]
        of_stages = []
        for forward in self._mask_forwards:
            masks = forward(features, rois)["mask_preds"]
            if masks.shape[1] > 1:
                masks = masks.gather(1, labels.expand(-1, -1, *masks.shape[2:]))
            of_stages.append(masks[:, 0].sigmoid())
        masks = _mean(of_stages).unflatten(0, (-1, detections.boxes.shape[1]))
        return torch.where((detections.scores > UNUSED)[:, :, None, None], masks, 0.0)


def _refined(
    head: nn.Module, boxes: Tensor, logits: Tensor, encoded: Tensor, image_sizes: Tensor
) -> Tensor:
    """``BBoxHead.regress_by_class``: the boxes that the next stage of a cascade is given.

    Args:
        head: of the stage.
        boxes: (N, P, 4), which the stage was given.
        logits: (N, P, classes + 1).
        encoded: (N, P, classes or 1, 4).
        image_sizes: (N, 2).
    """
    if encoded.shape[2] > 1:
        labels = logits[:, :, :-1].argmax(dim=2)[:, :, None, None]
        encoded = encoded.gather(2, labels.expand(-1, -1, -1, 4))
    return decode(head.bbox_coder, boxes, encoded[:, :, 0], image_sizes)


def _mean(of_stages: Sequence[Tensor]) -> Tensor:
    return of_stages[0] if len(of_stages) == 1 else sum(of_stages) / len(of_stages)


_OF_A_HEAD = ("predict_by_feat", "_predict_by_feat_single")


def _check_box_head(head: nn.Module, where: str) -> None:
    _check(head, BBoxHead, (*_OF_A_HEAD, "regress_by_class"), where)
    check_coder(head.bbox_coder, where)
    if head.custom_cls_channels or head.custom_activation:
        raise ExportError(f"{where}.loss_cls: {type(head.loss_cls).__name__} is not supported")
    if not (head.with_cls and head.with_reg):
        raise ExportError(f"{where}: expected both with_cls and with_reg")


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
