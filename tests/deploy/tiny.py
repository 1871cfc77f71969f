"""Detectors small enough to export in seconds, which find something without having been trained."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from torch import Tensor, nn

from mmdcn.layers import DeformRoIPoolPack

# Two stages of a ResNet-18, and a pyramid of two levels.
_BODY = """
custom_imports = dict(imports=['mmdcn'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        depth=18, base_channels=8, num_stages=2, strides=(1, 2), dilations=(1, 1),
        out_indices=(0, 1), frozen_stages=-1, init_cfg=None),
    neck=dict(in_channels=[8, 16], out_channels=32, start_level=0, num_outs=2))
"""

_TWO_STAGES = """
model['rpn_head'] = dict(
    in_channels=32, feat_channels=32, anchor_generator=dict(strides=[4, 8]))
model['roi_head'] = dict(
    bbox_roi_extractor=dict(out_channels=32, featmap_strides=[4, 8], finest_scale=8),
    bbox_head=dict(in_channels=32, fc_out_channels=32, num_classes=3))
model['test_cfg'] = dict(rpn=dict(nms_pre=200, max_per_img=60), rcnn=dict(max_per_img=40))
"""

_MASKS = """
model['roi_head'].update(
    mask_roi_extractor=dict(out_channels=32, featmap_strides=[4, 8], finest_scale=8),
    mask_head=dict(in_channels=32, conv_out_channels=16, num_convs=1, num_classes=3))
"""

_CASCADE = """
model['rpn_head'] = dict(
    in_channels=32, feat_channels=32, anchor_generator=dict(strides=[4, 8]))
model['roi_head'] = dict(
    num_stages=2,
    stage_loss_weights=[1, 0.5],
    bbox_roi_extractor=dict(out_channels=32, featmap_strides=[4, 8], finest_scale=8),
    bbox_head=[
        dict(
            type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=32, num_classes=3,
            reg_class_agnostic=agnostic,
            bbox_coder=dict(
                type='DeltaXYWHBBoxCoder',
                target_means=[0.0] * 4, target_stds=[std, std, 2 * std, 2 * std]))
        for agnostic, std in ((False, 0.1), (True, 0.05))],
    mask_roi_extractor=dict(out_channels=32, featmap_strides=[4, 8], finest_scale=8),
    mask_head=dict(in_channels=32, conv_out_channels=16, num_convs=1, num_classes=3))
model['test_cfg'] = dict(rpn=dict(nms_pre=200, max_per_img=60), rcnn=dict(max_per_img=40))
"""

_ONE_STAGE = """
model['bbox_head'] = dict(
    in_channels=32, feat_channels=32, stacked_convs=1, num_classes=3, {0})
model['test_cfg'] = dict(nms_pre=200, max_per_img=40)
"""

_DYHEAD = """
model['neck'] = [
    dict(type='FPN', in_channels=[8, 16], out_channels=32, start_level=0, num_outs=2),
    dict(type='DyHead', in_channels=32, out_channels=32, num_blocks=1)]
model['bbox_head'] = dict(
    in_channels=32, feat_channels=32, num_classes=3, anchor_generator=dict(strides=[4, 8]))
model['test_cfg'] = dict(nms_pre=200, max_per_img=40)
"""

#: What each detector's config inherits from, and says.
CONFIGS = {
    "faster-rcnn": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", _TWO_STAGES),
    "mask-rcnn": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", _TWO_STAGES + _MASKS),
    "retinanet": (
        "retinanet/retinanet_r50_fpn_1x_coco.py",
        _ONE_STAGE.format("anchor_generator=dict(strides=[4, 8])"),
    ),
    "fcos": (
        "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
        _ONE_STAGE.format("strides=[4, 8], regress_ranges=((-1, 64), (64, 1e8))"),
    ),
    "atss": (
        "atss/atss_r50_fpn_1x_coco.py",
        _ONE_STAGE.format("anchor_generator=dict(strides=[4, 8])"),
    ),
    "gfl": (
        "gfl/gfl_r50_fpn_1x_coco.py",
        _ONE_STAGE.format("anchor_generator=dict(strides=[4, 8])"),
    ),
    "vfnet": (
        "vfnet/vfnet_r50_fpn_1x_coco.py",
        _ONE_STAGE.format(
            "strides=[4, 8], regress_ranges=((-1, 64), (64, 1e8)), anchor_generator=dict("
            "type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, "
            "center_offset=0.0, strides=[4, 8])"
        ),
    ),
    "reppoints": (
        "reppoints/reppoints-moment_r50_fpn_1x_coco.py",
        _ONE_STAGE.format("point_feat_channels=32, point_strides=[4, 8]"),
    ),
    "tood": (
        "tood/tood_r50_fpn_1x_coco.py",
        _ONE_STAGE.format("num_dcn=1, anchor_generator=dict(strides=[4, 8])").replace(
            "stacked_convs=1", "stacked_convs=2"
        ),
    ),
    "dyhead": ("dyhead/atss_r50_fpn_dyhead_1x_coco.py", _DYHEAD),
    "cascade-mask-rcnn": ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", _CASCADE),
}

#: For a two-stage detector: deformable RoI pooling in the place of RoI Align.
DEFORMABLE_POOLING = {
    "model.roi_head.bbox_roi_extractor.roi_layer": dict(
        _delete_=True,
        type="DeformRoIPoolPack",
        output_size=7,
        output_channels=32,
        deform_fc_channels=16,
        sampling_ratio=2,
    )
}

# The layers whose outputs are scores and boxes, and those that give offsets.
_LAST = ("_cls", "_reg", "_cls_out", "_init_out", "_refine_out", "reg_refine")
# Of TOOD an exponential is the box, which must not be thousands of pixels wide; of GFL it is the
# mean of a distribution, and where that is nearly flat all boxes are alike and suppress each other.
_SPREADS = {"tood_reg": 0.05, "gfl_reg": 1.0}
_OFFSETS = ("conv_offset", "spatial_conv_offset")


@functools.cache
def _config(name: str) -> Config:
    base, text = CONFIGS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(f"_base_ = 'mmdet::{base}'\n{_BODY}{text}")
        return Config.fromfile(path)


def config(name: str, layer: str | None = None, **options: object) -> Config:
    """The config of a detector, with a deformable layer in the backbone's second stage or none."""
    cfg = copy.deepcopy(_config(name))
    if layer is not None:
        cfg.model.backbone.dcn = dict(type=layer, fallback_on_stride=False)
        cfg.model.backbone.stage_with_dcn = (False, True)
    cfg.merge_from_dict(options)
    return cfg


def build(cfg: Config, **spreads: float) -> nn.Module:
    """The detector of a config, whose scores are far from each other and from zero.

    `spreads` are standard deviations of weights, by the names of the layers that they are for.
    """
    spreads = _SPREADS | spreads
    torch.manual_seed(0)
    detector = MODELS.build(cfg.model).eval()
    for name, module in detector.named_modules():
        last = name.rpartition(".")[2]
        if last.endswith(_LAST) and isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=spreads.get(last, 0.2))
            nn.init.normal_(module.bias, std=0.2)
        elif isinstance(module, DeformRoIPoolPack):
            nn.init.normal_(module.offset_fc[-1].weight, std=0.05)
        elif last in _OFFSETS or name.endswith("reg_offset_module.2"):
            nn.init.normal_(module.weight, std=0.05)
    return detector


def images(*sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A batch of noise, and the sizes of its images without padding."""
    height, width = (max(side) for side in zip(*sizes))
    return torch.randn(len(sizes), 3, height, width), torch.tensor(sizes)


def predicted(detector: nn.Module, batch: Tensor, sizes: Tensor) -> list[DetDataSample]:
    """What mmdet predicts, in pixels of the batch."""
    samples = []
    for size in sizes.tolist():
        meta = dict(img_shape=tuple(size), ori_shape=tuple(size), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta))
    with torch.no_grad():
        return detector.predict(batch, samples, rescale=False)
