"""What keeps runs with one seed from being equal is said before training."""

import re

import pytest

from mmdcn.engine import preflight
from mmdcn.engine.preflight import determinism

from .checked import message_of


@pytest.fixture
def on_gpu(monkeypatch):
    """As where the toolbox finds a GPU, with the environment that products need."""
    monkeypatch.setattr(determinism, "get_device", lambda: "cuda")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def deterministic(config):
    """The config with a detector of one deformable backbone that can be built."""
    config.model = dict(
        type="RPN",
        neck=None,
        train_cfg=None,
        test_cfg=dict(rpn=None),
        backbone=dict(
            type="ResNet",
            depth=50,
            base_channels=16,
            out_indices=(3,),
            dcn=dict(type="DCNv2"),
            stage_with_dcn=(False, False, False, True),
        ),
        rpn_head=dict(
            type="RPNHead",
            in_channels=512,
            anchor_generator=dict(type="AnchorGenerator", scales=[8], ratios=[1.0], strides=[32]),
        ),
    )
    config.randomness = dict(seed=0, deterministic=True)
    return config


def silently(config):
    assert preflight.check(config, ("train",)) == []


@pytest.mark.parametrize("layer", ["DCN", "DCNv2", "DCNv3", "DCNv4"])
def test_each_layer_on_the_cpu(deterministic, layer):
    deterministic.model.backbone.dcn.type = layer
    silently(deterministic)


@pytest.mark.parametrize("layer", ["DCN", "DCNv2"])
def test_convolutions_on_a_gpu(deterministic, on_gpu, layer):
    deterministic.model.backbone.dcn.type = layer
    silently(deterministic)


@pytest.mark.parametrize("layer", ["DCNv3", "DCNv4"])
def test_layers_that_cannot_on_a_gpu(deterministic, on_gpu, layer):
    deterministic.model.backbone.dcn.type = layer
    message = message_of(deterministic)
    assert f"backbone.layer4.0.conv2 ({layer})" in message
    assert "have no deterministic gradient and would stop the first iteration" in message
    assert "(randomness.deterministic)" in message
    deterministic.randomness.deterministic = False
    silently(deterministic)


def test_products_on_a_gpu_need_a_variable(deterministic, on_gpu, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert "environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8" in message_of(deterministic)


def add_roi_layer(config, **layer):
    """A RoI head with a pooling layer, in mmdet's way."""
    config.model = dict(
        type="FastRCNN",
        train_cfg=None,
        test_cfg=dict(rcnn=None),
        backbone=dict(type="ResNet", depth=18, base_channels=8),
        roi_head=dict(
            type="StandardRoIHead",
            bbox_roi_extractor=dict(
                type="SingleRoIExtractor", roi_layer=layer, out_channels=8, featmap_strides=[4]
            ),
            bbox_head=dict(type="Shared2FCBBoxHead", in_channels=8, num_classes=2),
        ),
    )


@pytest.mark.parametrize("layer", ["DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"])
def test_our_pooling_cannot_on_a_gpu(deterministic, on_gpu, layer):
    add_roi_layer(deterministic, type=layer, output_size=7, output_channels=64)
    message = message_of(deterministic)
    assert f"roi_layers.0 ({layer})' have no deterministic gradient" in message


def test_kernels_of_mmcv_are_warned_of(deterministic, on_gpu):
    add_roi_layer(deterministic, type="RoIAlign", output_size=7, sampling_ratio=0)
    (warned,) = preflight.check(deterministic, ("train",))
    assert re.search(r"mmcv's kernels do not follow .*\(RoIAlign\)", warned)
