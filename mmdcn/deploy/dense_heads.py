"""Decoders of dense heads, for a batch of images: RPN's, and what most one-stage heads share.

A decoder stands for one of mmdet's own per-image decoding methods, and is chosen by it: a head that
overrides the method decodes in a way of its own, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from . import operators
from .decoding import (
    Detections,
    Suppression,
    at,
    candidates,
    check_coder,
    decode,
    large_enough,
    positive,
)
from .operators import UNUSED
from .refusals import ExportError, inherits

__all__ = ["decoder_of"]

_METHODS = ("predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")


class _Decoder:
    """The part that decoders have in common: settings, priors and scores.

    Args:
        head: the dense head.
        where: its place in the config.

    Raises:
        ExportError: it has settings that this does not follow.
    """

    def __init__(self, head: nn.Module, where: str) -> None:
        self.head = head
        settings: Mapping = head.test_cfg or {}
        settings_at = f"the test_cfg of {where}"
        check_coder(head.bbox_coder, where)
        if getattr(head.loss_cls, "custom_cls_channels", False):
            raise ExportError(f"{where}.loss_cls: {type(head.loss_cls).__name__} is not supported")
        self.suppression = Suppression.of(settings, settings_at)
        self.nms_pre = positive(settings, "nms_pre", settings_at)
        self.min_bbox_size = settings.get("min_bbox_size", -1)
        self.score_thr = settings.get("score_thr", 0)

    def __call__(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
        """Decode a batch.

        Args:
            outputs: of the head: for scores, boxes and perhaps factors, a tensor (N, C, H, W) for
                each level.
            image_sizes: (N, 2), height and width without padding.
        """
        raise NotImplementedError

    def _priors(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The priors of each level, (M, 2 or 4)."""
        sizes = [x.shape[-2:] for x in scores]
        generate = self.head.prior_generator.grid_priors
        priors = generate(sizes, dtype=scores[0].dtype, device=scores[0].device)
        return [get_box_tensor(prior) for prior in priors]

    def _activated(self, scores: Tensor) -> Tensor:
        """Probabilities of the classes, without the background."""
        if self.head.use_sigmoid_cls:
            return scores.sigmoid()
        return scores.softmax(-1)[..., :-1]


def _rows(x: Tensor, width: int) -> Tensor:
    """(N, A · width, H, W) -> (N, H · W · A, width), the order of priors."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)


class _BaseDenseHeadDecoder(_Decoder):
    """``BaseDenseHead._predict_by_feat_single``: of RetinaNet, FCOS, ATSS, VFNet and more."""

    def __init__(self, head: nn.Module, where: str) -> None:
        super().__init__(head, where)
        # mmdet compares sizes after it has scaled boxes to the image file's size.
        if self.min_bbox_size > 0:
            raise ExportError(
                f"the test_cfg of {where}.min_bbox_size: expected 0, as boxes are in pixels of "
                f"the network's input here, got {self.min_bbox_size}"
            )

    def __call__(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
        scores, encoded, *factors = outputs
        factors = factors[0] if factors and factors[0] is not None else [None] * len(scores)
        levels = map(self._of_level, scores, encoded, factors, self._priors(scores))
        best, labels, priors, encoded = (torch.cat(parts, dim=1) for parts in zip(*levels))
        boxes = decode(self.head.bbox_coder, priors, encoded, image_sizes)
        best = candidates(best, large_enough(boxes, self.min_bbox_size))
        classes = torch.arange(self.head.num_classes, device=labels.device)
        by_class = candidates(best[:, None], labels[:, None] == classes[:, None])
        kept, places = self.suppression(boxes[:, None], by_class)
        places = places % boxes.shape[1]
        return Detections(at(boxes, places), kept, labels.gather(1, places))

    def _of_level(
        self, scores: Tensor, encoded: Tensor, factors: Tensor | None, priors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best pairs of prior and class: scores, labels, priors, and boxes as predicted."""
        k = self.nms_pre
        scores = self._activated(_rows(scores, self.head.cls_out_channels))
        # The k best pairs are of the k priors whose best classes are best.
        found, indices = operators.select_top_k(scores.amax(dim=2), k)
        chosen = candidates(at(scores, indices), (found > UNUSED)[:, :, None])
        chosen = candidates(chosen, chosen > self.score_thr)
        best, pairs = operators.select_top_k(chosen.flatten(1), k)
        classes = scores.shape[2]
        labels, indices = pairs % classes, indices.gather(1, pairs // classes)
        if factors is not None:
            weights = _rows(factors, 1).sigmoid()
            best = candidates(best * at(weights, indices)[:, :, 0], best > UNUSED)
        return best, labels, priors[indices], at(_rows(encoded, 4), indices)


class _RPNDecoder(_Decoder):
    """``RPNHead._predict_by_feat_single``: levels are the groups of suppression."""

    def __call__(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
        scores, encoded = outputs[:2]
        found, boxes = [], []
        for x, deltas, priors in zip(scores, encoded, self._priors(scores)):
            all_scores = self._activated(_rows(x, self.head.cls_out_channels))
            best, indices = operators.select_top_k(all_scores[:, :, 0], self.nms_pre)
            deltas = at(_rows(deltas, 4), indices)
            decoded = decode(self.head.bbox_coder, priors[indices], deltas, image_sizes)
            found.append(candidates(best, large_enough(decoded, self.min_bbox_size)))
            boxes.append(decoded)
        every = torch.stack(boxes, dim=1)
        kept, places = self.suppression(every, torch.stack(found, dim=1))
        return Detections(at(every.flatten(1, 2), places), kept, torch.zeros_like(places))


# In this order, as one is a subclass of the other.
_DECODERS = ((RPNHead, _RPNDecoder), (BaseDenseHead, _BaseDenseHeadDecoder))


def decoder_of(head: nn.Module, where: str) -> _Decoder:
    """The decoder for a dense head.

    Args:
        head: of mmdet's dense heads.
        where: its place in the config, for messages.

    Raises:
        ExportError: the head decodes in a way of its own, or has settings that are not followed.
    """
    for ancestor, decoder in _DECODERS:
        if inherits(head, ancestor, _METHODS):
            return decoder(head, where)
    raise ExportError(
        f"{where}: {type(head).__name__} decodes in a way of its own, which has no counterpart "
        "here; its raw outputs can be written (--raw)"
    )
