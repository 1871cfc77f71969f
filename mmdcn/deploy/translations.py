"""Translation of the operators of decoding to ONNX's standard ones.

What depends on values is here: how many candidates there are, which boxes are kept, which RoIs a
level pools. It needs the packages onnx and onnxscript, as torch's exporter does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from onnxscript.onnx_opset import opset19 as op

from . import operators

__all__ = ["TRANSLATIONS"]

# A value of the graph; torch's exporter calls each translation with these.
Value = Any


def _ints(*values: int) -> Value:
    return op.Constant(value=ir.tensor(np.array(values, dtype=np.int64)))


def _floats(*values: float) -> Value:
    return op.Constant(value=ir.tensor(np.array(values, dtype=np.float32)))


def _float(value: float) -> Value:
    return op.Constant(value=ir.tensor(np.array(value, dtype=np.float32)))


def _int(value: int) -> Value:
    return op.Constant(value=ir.tensor(np.array(value, dtype=np.int64)))


def select_top_k(scores: Value, k: int, fill: float = operators.UNUSED) -> tuple[Value, Value]:
    """``TopK`` of as many as there are, and ``Pad``."""
    present = op.Min(op.Shape(scores, start=1, end=2), _ints(k))
    found, indices = op.TopK(scores, present, axis=1)
    missing = op.Concat(_ints(0, 0, 0), op.Sub(_ints(k), present), axis=0)
    return op.Pad(found, missing, _float(fill)), op.Pad(indices, missing, _int(0))


def nms(boxes: Value, scores: Value, iou_threshold: float, max_per_group: int) -> Value:
    """``NonMaxSuppression``, whose batch is images, or images and groups; and ``ScatterND``."""
    groups = scores.shape[1]
    shape = op.Shape(scores)
    own_boxes = boxes.shape[1] != 1
    if own_boxes or groups == 1:
        # (N, G, M, 4) -> (N G, M, 4)
        boxes = op.Reshape(boxes, op.Concat(_ints(-1), op.Shape(boxes, start=2), axis=0))
        rows = op.Reshape(
            scores, op.Concat(_ints(-1, 1), op.Shape(scores, start=2), axis=0), allowzero=1
        )
    else:
        boxes = op.Squeeze(boxes, _ints(1))
        rows = scores
    chosen = op.NonMaxSuppression(
        boxes, rows, _ints(max_per_group), _floats(iou_threshold), _floats(operators.UNUSED)
    )
    kept = op.ScatterND(
        op.Expand(_float(operators.UNUSED), op.Shape(rows)), chosen, op.GatherND(rows, chosen)
    )
    return op.Reshape(kept, shape, allowzero=1)


def multi_level_roi_align(
    features: Sequence[Value],
    rois: Value,
    levels: Value,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
) -> Value:
    """``RoiAlign`` of each level, for those RoIs that are its own, and ``ScatterND``."""
    height, width = output_size
    channels = features[0].shape[1]
    images = op.Cast(op.Gather(rois, _int(0), axis=1), to=ir.DataType.INT64.value)
    boxes = op.Slice(rois, _ints(1), _ints(5), _ints(1))
    size = op.Concat(op.Shape(rois, start=0, end=1), _ints(channels, height, width), axis=0)
    pooled = op.Expand(_float(0.0), size)
    for level, (x, scale) in enumerate(zip(features, spatial_scales)):
        own = op.Transpose(op.NonZero(op.Equal(levels, _int(level))), perm=[1, 0])
        of_level = op.RoiAlign(
            x,
            op.GatherND(boxes, own),
            op.GatherND(images, own),
            mode="avg",
            output_height=height,
            output_width=width,
            sampling_ratio=sampling_ratio,
            spatial_scale=scale,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        )
        pooled = op.ScatterND(pooled, own, of_level)
    return pooled


#: What `torch.onnx.export` takes as its ``custom_translation_table``.
TRANSLATIONS: dict[Any, Callable] = {
    torch.ops.mmdcn_deploy.select_top_k.default: select_top_k,
    torch.ops.mmdcn_deploy.nms.default: nms,
    torch.ops.mmdcn_deploy.multi_level_roi_align.default: multi_level_roi_align,
}
