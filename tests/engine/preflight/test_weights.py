"""Checkpoints of detectors whose own layers, or mmcv's, take no device from torch's context."""

import pytest
import torch
from mmdet.registry import MODELS

from mmdcn.engine.preflight.building import build_without_memory
from mmdcn.engine.preflight.weights import checkpoint_problems
from tests.deploy import tiny


def problems(cfg, weights, path):
    torch.save({"state_dict": weights}, path)
    cfg.load_from = str(path)
    return list(checkpoint_problems(cfg, build_without_memory(cfg), None, is_training=False))


@pytest.mark.parametrize("name", [*tiny.CONFIGS, "guided anchoring"])
def test_a_checkpoint_of_the_same_detector_fits(name, tmp_path):
    """mmcv's layers, which heads take, are filled from ``torch.Tensor(…)``, on the CPU."""
    cfg = tiny.config("atss" if name == "guided anchoring" else name)
    if name == "guided anchoring":
        head = dict(type="GARetinaHead", num_classes=2, in_channels=32, feat_channels=32)
        cfg.model.bbox_head = head
        cfg.model.pop("train_cfg")
    weights = MODELS.build(cfg.model).state_dict()
    assert problems(cfg, weights, tmp_path / "a.pth") == []
    del weights[next(key for key in weights if key.endswith(".weight"))]
    ((_, said),) = problems(cfg, weights, tmp_path / "b.pth")
    assert "lacks 1 weights of the model" in said


@pytest.mark.parametrize("layer", ["ConvAWS", "SAC"])
def test_a_checkpoint_of_layers_that_compute_with_what_they_load(layer, tmp_path):
    """DetectoRS's: its own convolution, and the switchable one, which may be deformable."""
    cfg = tiny.config("atss")
    resnet = dict(type="DetectoRS_ResNet", depth=50, conv_cfg=dict(type="ConvAWS"))
    if layer == "SAC":
        resnet.update(sac=dict(type="SAC", use_deform=True), stage_with_sac=(False, True))
    cfg.model.backbone.update(resnet)
    weights = MODELS.build(cfg.model).state_dict()
    assert problems(cfg, weights, tmp_path / "a.pth") == []
    name = "backbone.conv1.weight"
    shape = ", ".join(map(str, weights[name].shape))
    weights[name] = torch.zeros(1, 3, 7, 7)
    ((_, said),) = problems(cfg, weights, tmp_path / "b.pth")
    assert f"1 weights of {str(tmp_path / 'b.pth')!r} do not fit" in said
    assert f"{name}: (1, 3, 7, 7) for ({shape})" in said
    del weights[name]
    ((_, said),) = problems(cfg, weights, tmp_path / "c.pth")
    assert f"lacks 1 weights of the model, such as {name!r}" in said


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_no_part_of_a_model_is_built_with_memory(name):
    model = build_without_memory(tiny.config(name))
    for key, value in model.state_dict().items():
        assert value.is_meta, key
