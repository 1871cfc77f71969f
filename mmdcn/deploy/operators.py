"""The operators of decoding, whose output shapes do not depend on values.

What a detector does after its network depends on values: how many candidates exceed a threshold,
which boxes suppress which, at which level a box is pooled. Each operator hides such a step behind
an output of a fixed shape, in which unused places are marked. So a traced graph has no size that
depends on values, and what does is in the operator's translation alone
(:mod:`mmdcn.deploy.translations`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmcv.ops import nms as mmcv_nms
from mmcv.ops import roi_align
from torch import Tensor

from mmdcn.ops import deform_roi_pool

__all__ = ["UNUSED", "multi_level_roi_align", "nms", "select_top_k"]

#: The score of what is no candidate. Scores are probabilities, or products of these.
UNUSED = -1.0


@torch.library.custom_op("mmdcn_deploy::select_top_k", mutates_args=())
def select_top_k(scores: Tensor, k: int, fill: float = UNUSED) -> tuple[Tensor, Tensor]:
    """The `k` largest scores of each row, in descending order, and where they are.

    Args:
        scores: (N, M), of any M.
        k: how many.
        fill: the score of places that are left where M < k; their index is 0.

    Returns:
        Scores (N, k), and their indices (N, k) in int64.

    Example:
        >>> select_top_k(torch.tensor([[0.2, 0.9]]), 3)
        (tensor([[ 0.9000,  0.2000, -1.0000]]), tensor([[1, 0, 0]]))
    """
    found, indices = scores.topk(min(k, scores.shape[1]), dim=1)
    missing = (0, k - found.shape[1])
    pad = torch.nn.functional.pad
    return pad(found, missing, value=fill).clone(), pad(indices, missing).clone()


@select_top_k.register_fake
def _(scores: Tensor, k: int, fill: float = UNUSED) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], k)
    return scores.new_empty(shape), scores.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("mmdcn_deploy::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, max_per_group: int) -> Tensor:
    """Non-maximum suppression within each group of each image.

    Args:
        boxes: (N, G, M, 4), or (N, 1, M, 4) where all groups have the same: left, top, right,
            bottom.
        scores: (N, G, M), of G groups such as classes; :data:`UNUSED` where there is no candidate.
        iou_threshold: a box suppresses those of lower scores that it overlaps by more than this.
        max_per_group: no more than this number of boxes is kept in each group.

    Returns:
        The scores (N, G, M) of the boxes that are kept, and :data:`UNUSED` for all others.

    Example:
        >>> boxes = torch.tensor([[[[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0]]]])
        >>> nms(boxes, torch.tensor([[[0.5, 0.6]]]), 0.5, 10)
        tensor([[[-1.0000,  0.6000]]])
    """
    kept = torch.full_like(scores, UNUSED)
    for image, group in (scores > UNUSED).any(dim=2).nonzero().tolist():
        candidates = (scores[image, group] > UNUSED).nonzero()[:, 0]
        own = boxes[image, group if boxes.shape[1] > 1 else 0, candidates]
        _, order = mmcv_nms(own, scores[image, group, candidates], iou_threshold)
        chosen = candidates[order[:max_per_group]]
        kept[image, group, chosen] = scores[image, group, chosen]
    return kept


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_per_group: int) -> Tensor:
    return torch.empty_like(scores)


@torch.library.custom_op("mmdcn_deploy::multi_level_roi_align", mutates_args=())
def multi_level_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """RoI Align in which each box is pooled at its own level only.

    Args:
        features: of each level, (N, C, H, W).
        rois: (R, 5): the image's number, then left, top, right, bottom in pixels of the image.
        levels: (R,) in int64, the level of each RoI; -1 for those that are not pooled.
        output_size: height and width of what is pooled.
        spatial_scales: pixels of each level's feature map to a pixel of the image.
        sampling_ratio: samples to a bin along each side; 0 for as many as pixels are in it.
        aligned: whether a pixel's centre is at half its size.

    Returns:
        (R, C, height, width), zero where a RoI is not pooled.

    Example:
        >>> x = torch.ones(1, 8, 20, 20)
        >>> rois = torch.tensor([[0.0, 4.0, 4.0, 40.0, 40.0]])
        >>> levels = torch.zeros(1, dtype=torch.long)
        >>> multi_level_roi_align([x], rois, levels, [7, 7], [0.25], 0, True).shape
        torch.Size([1, 8, 7, 7])
    """
    height, width = output_size
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], height, width)
    for level, (x, scale) in enumerate(zip(features, spatial_scales)):
        own = (levels == level).nonzero()[:, 0]
        if not len(own):
            continue
        if aligned:  # which our pooling is without offsets, on a CPU in a tenth of mmcv's time
            pooled[own] = deform_roi_pool(
                x, rois[own], None, (height, width), scale, sampling_ratio
            )
        else:
            pooled[own] = roi_align(
                x, rois[own], (height, width), scale, sampling_ratio, "avg", aligned
            )
    return pooled


@multi_level_roi_align.register_fake
def _(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return features[0].new_empty(rois.shape[0], features[0].shape[1], *output_size)
