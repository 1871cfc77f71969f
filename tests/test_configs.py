"""The configs load and build, and one iteration of each detector trains its deformable layers."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn

from mmdcn import layers, plugin
from tests.kernel_calls import KernelCalls

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

V1, V2, V4 = layers.DeformConv2dPack, layers.ModulatedDeformConv2dPack, layers.DCNv4
POOL, MODULATED_POOL = layers.DeformRoIPoolPack, layers.ModulatedDeformRoIPoolPack
# Stages c3 to c5 have 2 + 2 + 2 blocks in R-18, 4 + 6 + 3 in R-50, and 4 + 23 + 3 in R-101.
DEFORMABLE = {
    "faster_rcnn/faster-rcnn_r18_fpn_1x_coco.py": (None, 0),
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": (None, 0),
    "faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py": (None, 0),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": (None, 0),
    "dcn/cascade-mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": (V1, 13),
    "dcn/cascade-mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcn/cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": (V1, 13),
    "dcn/cascade-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcn/faster-rcnn_r18-dconv-c3-c5_fpn_1x_coco.py": (V1, 6),
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": (V1, 13),
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py": (POOL, 4),
    "dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcn/faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py": (V1, 13),
    "dcn/mask-rcnn_r50-dconv-c3-c5_fpn_amp-1x_coco.py": (V1, 13),
    "dcn/mask-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py": (V1, 30),
    "dcnv2/faster-rcnn_r18-mdconv-c3-c5_fpn_1x_coco.py": (V2, 6),
    "dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": (V2, 13),
    "dcnv2/faster-rcnn_r50_mdconv-fpn-rpn_1x_coco.py": (V2, 5),
    "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py": (V2, 13),
    "dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py": (MODULATED_POOL, 4),
    "dcnv2/faster-rcnn_r101-mdconv-c3-c5_fpn_1x_coco.py": (V2, 30),
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py": (V2, 13),
    "dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_amp-1x_coco.py": (V2, 13),
    "dcnv4/faster-rcnn_r50-dcnv4-c3-c5_fpn_1x_coco.py": (V4, 13),
}
# Those of other operators are trained in the tests of their layers.
TRAINED = [
    name
    for name, (kind, _) in DEFORMABLE.items()
    if kind in (None, V1, V2) and re.search(r"/(faster|mask)-rcnn_r(18|50).*_fpn_1x", name)
]


@pytest.fixture(autouse=True)
def installed():
    plugin.install()


def build(config: Config) -> nn.Module:
    """The detector, without the pretrained weights that would have to be downloaded."""
    init_default_scope(config.default_scope)
    config.model.backbone.init_cfg = None
    return MODELS.build(config.model)


def deformable_layers(model: nn.Module) -> list[nn.Module]:
    kinds = (V1, V2, V4, POOL, MODULATED_POOL)
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_all_are_here():
    found = {
        str(path.relative_to(CONFIGS))
        for path in CONFIGS.rglob("*.py")
        if path.relative_to(CONFIGS).parts[0] != "demo"
    }
    assert found == set(DEFORMABLE)


@pytest.mark.parametrize("name", DEFORMABLE)
def test_builds_with_our_layers(name):
    config = Config.fromfile(CONFIGS / name)
    assert config.custom_imports.imports == ["mmdcn"]
    assert config.train_dataloader.dataset.data_root == "data/coco/"
    assert config.train_cfg.max_epochs == 12
    with torch.device("meta"):
        model = build(config)
    kind = "CascadeRCNN" if "cascade" in name else "MaskRCNN" if "mask" in name else "FasterRCNN"
    assert type(model).__name__ == kind
    assert config.optim_wrapper.type == ("AmpOptimWrapper" if "_amp-" in name else "OptimWrapper")
    layer_type, count = DEFORMABLE[name]
    found = deformable_layers(model)
    assert len(found) == count
    assert all(isinstance(layer, layer_type) for layer in found)
    hooks = [hook.type for hook in config.default_hooks.values()]
    assert "LoggerHook" in hooks
    assert ("OffsetStatisticsHook" in hooks) == (layer_type in (V1, V2, V4))
    # What is not deformable is as in the plain baseline.
    assert not any(
        "Deform" in type(module).__name__ for module in model.modules() if module not in found
    )


@pytest.mark.parametrize("name", ["r50-dconv-c3-c4_fpn", "r50-mdconv-c3-c4_fpn", "r50_fpn"])
def test_offsets_of_the_demo_are_logged(name):
    config = Config.fromfile(CONFIGS / f"demo/faster-rcnn_{name}_demo.py")
    hooks = [hook.type for hook in config.default_hooks.values()]
    assert "LoggerHook" in hooks
    assert ("OffsetStatisticsHook" in hooks) == ("dconv" in name)


def narrow(config: Config) -> Config:
    """An eighth of the channels: quick to initialise and to run, and of the same structure."""
    heads = config.model.roi_head
    config.model.backbone.update(base_channels=8, stem_channels=8)
    # Else each block starts as the identity, and no gradient reaches what is in it.
    config.model.backbone.zero_init_residual = False
    channels = [planes // 8 for planes in config.model.neck.in_channels]
    config.model.neck.update(in_channels=channels, out_channels=32)
    config.model.rpn_head.update(in_channels=32, feat_channels=32)
    heads.bbox_roi_extractor.out_channels = 32
    heads.bbox_head.update(in_channels=32, fc_out_channels=64)
    if "mask_head" in heads:
        heads.mask_roi_extractor.out_channels = 32
        heads.mask_head.update(in_channels=32, conv_out_channels=32)
    return config


@pytest.mark.parametrize("name", TRAINED)
def test_one_training_iteration(name):
    torch.manual_seed(0)
    model = build(narrow(Config.fromfile(CONFIGS / name)))
    model.init_weights()
    found = deformable_layers(model)
    assert not any(p.any() for layer in found for p in layer.conv_offset.parameters())

    model.train()
    data = demo_mm_inputs(2, [[3, 96, 128], [3, 128, 96]], num_classes=80, with_mask="mask" in name)
    with KernelCalls() as calls:
        data = model.data_preprocessor(data, training=True)
        loss, losses = model.parse_losses(model(**data, mode="loss"))
        loss.backward()
    count = DEFORMABLE[name][1]
    assert len(found) == count
    assert (calls.forward, calls.backward, calls.mmcv) == (count, count, 0)
    assert all(value.isfinite().all() for value in losses.values())
    for layer in found:
        for parameter in layer.parameters():
            assert parameter.grad.isfinite().all()
            assert parameter.grad.any()

    model.eval()
    with KernelCalls() as calls, torch.no_grad():
        predictions = model(**data, mode="predict")
    assert (calls.forward, calls.backward, calls.mmcv) == (count, 0, 0)
    assert len(predictions) == 2
