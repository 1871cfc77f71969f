"""Decoders of dense heads, for a batch of images: RPN's, and what most one-stage heads share.

A decoder stands for one of mmdet's own per-image decoding methods, and is chosen by it: a head that
overrides the method decodes in a way of its own, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmdet.models.dense_heads import GFLHead, RepPointsHead, RPNHead, TOODHead
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
    clip,
    decode,
    large_enough,
    positive,
)
from .operators import UNUSED
from .refusals import ExportError, inherits

__all__ = ["decoder_of", "outputs_of"]

_TOOD_METHODS = ("forward", "deform_sampling", "anchor_center")
_METHODS = ("predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")


class _Decoder:
    """The part that decoders have in common: settings, priors and scores.

    Args:
        head: the dense head.
        where: its place in the config.

    Raises:
        ExportError: it has settings that this does not follow.
    """

    #: Whether the head's ``bbox_coder`` makes the boxes.
    uses_coder = True

    def __init__(self, head: nn.Module, where: str) -> None:
        self.head = head
        settings: Mapping = head.test_cfg or {}
        settings_at = f"the test_cfg of {where}"
        if self.uses_coder:
            check_coder(head.bbox_coder, where)
        if getattr(head.loss_cls, "custom_cls_channels", False):
            raise ExportError(f"{where}.loss_cls: {type(head.loss_cls).__name__} is not supported")
        self.suppression = Suppression.of(settings, settings_at)
        self.nms_pre = positive(settings, "nms_pre", settings_at)
        self.min_bbox_size = settings.get("min_bbox_size", -1)
        self.score_thr = settings.get("score_thr", 0)

    def __call__(self, features: Sequence[Tensor], image_sizes: Tensor) -> Detections:
        """Detections of a batch.

        Args:
            features: of each level, (N, C, H, W).
            image_sizes: (N, 2), height and width without padding.
        """
        return self.decode(self.outputs(features), image_sizes)

    def outputs(self, features: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
        """The head's: scores, boxes and perhaps factors, of each level a tensor (N, C, H, W)."""
        return outputs_of(self.head, features)

    def decode(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
        """Detections from the head's outputs."""
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


def _centers(priors: Tensor) -> Tensor:
    """The centers (..., 2) of priors (..., 4)."""
    return (priors[..., :2] + priors[..., 2:]) / 2


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

    def decode(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
        scores, encoded, *factors = outputs
        factors = factors[0] if factors and factors[0] is not None else [None] * len(scores)
        levels = []
        for level, given in enumerate(zip(scores, encoded, factors, self._priors(scores))):
            best, labels, *found = self._of_level(*given)
            levels.append((best, labels, self._boxes(level, *found, image_sizes)))
        best, labels, boxes = (torch.cat(parts, dim=1) for parts in zip(*levels))
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
        return best, labels, priors[indices], at(_rows(encoded, self._encoded_size), indices)

    @property
    def _encoded_size(self) -> int:
        """How many numbers are predicted for a box."""
        return 4

    def _boxes(self, level: int, priors: Tensor, encoded: Tensor, image_sizes: Tensor) -> Tensor:
        """Boxes (N, K, 4) of a level from priors (N, K, 2 or 4) and what is predicted for each."""
        return decode(self.head.bbox_coder, priors, encoded, image_sizes)


class _GFLDecoder(_BaseDenseHeadDecoder):
    """``GFLHead._predict_by_feat_single``: distances are means of distributions."""

    @property
    def _encoded_size(self) -> int:
        return 4 * (self.head.reg_max + 1)

    def _activated(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def _boxes(self, level: int, priors: Tensor, encoded: Tensor, image_sizes: Tensor) -> Tensor:
        stride = self.head.prior_generator.strides[level][0]
        distances = self.head.integral(encoded).reshape(*encoded.shape[:2], 4) * stride
        return decode(self.head.bbox_coder, _centers(priors), distances, image_sizes)


class _RepPointsDecoder(_BaseDenseHeadDecoder):
    """``RepPointsHead._predict_by_feat_single``: the head's own points make the box."""

    uses_coder = False

    def _boxes(self, level: int, priors: Tensor, encoded: Tensor, image_sizes: Tensor) -> Tensor:
        boxes = encoded * self.head.point_strides[level] + priors.repeat(1, 1, 2)
        return clip(boxes, image_sizes)


class _TOODDecoder(_BaseDenseHeadDecoder):
    """``TOODHead``: it moves each box to one of its neighbours, before anything is chosen."""

    uses_coder = False

    def __init__(self, head: nn.Module, where: str) -> None:
        super().__init__(head, where)
        if head.anchor_type == "anchor_based":
            check_coder(head.bbox_coder, where)

    def _activated(self, scores: Tensor) -> Tensor:
        return scores

    def _boxes(self, level: int, priors: Tensor, encoded: Tensor, image_sizes: Tensor) -> Tensor:
        return encoded * self.head.prior_generator.strides[level][0]


class _RPNDecoder(_Decoder):
    """``RPNHead._predict_by_feat_single``: levels are the groups of suppression."""

    def decode(self, outputs: Sequence[Sequence[Tensor]], image_sizes: Tensor) -> Detections:
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


# --------------------------------------------------------------------- networks that can be traced


def outputs_of(head: nn.Module, features: Sequence[Tensor]) -> Sequence[Sequence[Tensor]]:
    """What a dense head's ``forward`` gives, in a way that leaves the batch open.

    ``TOODHead``'s goes through the images of a batch in a loop, whose number would become a
    constant; all else in it is done here in the same way, by the head's layers.

    Args:
        head: of mmdet's dense heads.
        features: of each level, (N, C, H, W).
    """
    if not inherits(head, TOODHead, _TOOD_METHODS):
        return head(features)
    return tuple(zip(*(_tood_level(head, level, x) for level, x in enumerate(features))))


def _tood_level(head: TOODHead, level: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (N, classes, H, W), and boxes (N, 4, H, W) in steps of the level."""
    interactive = []
    for convolution in head.inter_convs:
        x = convolution(x)
        interactive.append(x)
    seen = torch.cat(interactive, dim=1)
    mean = seen.mean(dim=(2, 3), keepdim=True)
    of_class = head.tood_cls(head.cls_decomp(seen, mean)).sigmoid()
    scores = (of_class * head.cls_prob_module(seen).sigmoid()).sqrt()
    boxes = _tood_boxes(head, level, head.tood_reg(head.reg_decomp(seen, mean)))
    moved = head.deform_sampling(boxes, head.reg_offset_module(seen))
    inverted = (moved[:, :2] > moved[:, 2:]).any(dim=1, keepdim=True)
    return scores, torch.where(inverted, boxes, moved)


def _tood_boxes(head: TOODHead, level: int, encoded: Tensor) -> Tensor:
    size = encoded.shape[2:]
    stride = head.prior_generator.strides[level][0]
    priors = head.prior_generator.single_level_grid_priors(size, level, device=encoded.device)
    if head.anchor_type == "anchor_free":
        x, y = (_centers(priors) / stride).unflatten(0, size).unbind(dim=2)
        left, top, right, bottom = head.scales[level](encoded.exp()).unbind(dim=1)
        return torch.stack([x - left, y - top, x + right, y + bottom], dim=1)
    rows = _rows(head.scales[level](encoded), 4)
    every = priors.expand(rows.shape[0], -1, -1).flatten(0, 1)
    boxes = get_box_tensor(head.bbox_coder.decode(every, rows.flatten(0, 1))) / stride
    return boxes.reshape(-1, *size, 4).permute(0, 3, 1, 2).contiguous()


# Those methods of each that must be its own, in an order in which subclasses come first.
_DECODERS = (
    (RPNHead, (), _RPNDecoder),
    (GFLHead, ("anchor_center",), _GFLDecoder),
    (TOODHead, _TOOD_METHODS, _TOODDecoder),
    (RepPointsHead, ("_bbox_decode",), _RepPointsDecoder),
    (BaseDenseHead, (), _BaseDenseHeadDecoder),
)


def decoder_of(head: nn.Module, where: str) -> _Decoder:
    """The decoder for a dense head.

    Args:
        head: of mmdet's dense heads.
        where: its place in the config, for messages.

    Raises:
        ExportError: the head decodes in a way of its own, or has settings that are not followed.
    """
    for ancestor, methods, decoder in _DECODERS:
        if inherits(head, ancestor, (*_METHODS, *methods)):
            return decoder(head, where)
    raise ExportError(
        f"{where}: {type(head).__name__} decodes in a way of its own, which has no counterpart "
        "here; its raw outputs can be written (--raw)"
    )
