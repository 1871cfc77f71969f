"""The layers that configs name. Which kernel ran is told by counting calls, not by names."""

import copy
import logging
import pickle
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")

import mmcv.cnn
import mmcv.ops
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from mmdcn import layers, plugin
from tests.kernel_calls import KernelCalls
from tests.layer_types import LAYER_TYPES
from tests.switched_off import switch_off


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


def inputs_for(layer: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    if hasattr(layer, "conv_offset"):
        return [x]
    inputs = [x, torch.randn(2, 18, 6, 6)]
    return [*inputs, torch.rand(2, 9, 6, 6)] if "Modulated" in type(layer).__name__ else inputs


@pytest.mark.parametrize("scope", ["", "mmdcn."])
@pytest.mark.parametrize("name", LAYER_TYPES)
@pytest.mark.parametrize("builder", ["root", "mmdet", "build_conv_layer"])
def test_names_build_our_layers(name, scope, builder):
    arguments = dict(in_channels=4, out_channels=6, kernel_size=3, padding=1)
    if builder == "build_conv_layer":
        layer = mmcv.cnn.build_conv_layer(dict(type=scope + name), **arguments)
    else:
        registry = MODELS
        if builder == "mmdet":
            registry = pytest.importorskip("mmdet.registry").MODELS
        layer = registry.build(dict(type=scope + name, **arguments))
    assert isinstance(layer, LAYER_TYPES[name])
    with KernelCalls() as calls:
        layer(*inputs_for(layer)).sum().backward()
    assert (calls.forward, calls.backward, calls.mmcv) == (1, 1, 0)


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_conv_module(name):
    module = mmcv.cnn.ConvModule(
        4,
        6,
        3,
        padding=1,
        conv_cfg=dict(type=name, deform_groups=2),
        norm_cfg=dict(type="BN"),
    )
    assert not any(p.any() for p in module.conv.conv_offset.parameters())
    assert (module.conv.bias is None) is (module.with_bias is False)
    with KernelCalls() as calls:
        module(torch.randn(2, 4, 6, 6)).sum().backward()
    assert (calls.forward, calls.backward, calls.mmcv) == (1, 1, 0)
    assert module.conv.conv_offset.weight.grad is not None


def test_the_offset_branch_of_a_backbone_trained_from_scratch_starts_at_zero():
    # mmengine initialises every nn.Conv2d, and this would include the branch's.
    registry = pytest.importorskip("mmdet.registry").MODELS
    for name in ("DCN", "DCNv2"):
        backbone = registry.build(
            dict(
                type="mmdet.ResNet",
                depth=50,
                base_channels=4,
                stem_channels=4,
                dcn=dict(type=name),
                stage_with_dcn=(False, True, True, True),
            )
        )
        backbone.init_weights()
        branches = [m.conv_offset for m in backbone.modules() if hasattr(m, "conv_offset")]
        assert len(branches) == 4 + 6 + 3
        assert not any(p.any() for branch in branches for p in branch.parameters())


@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_what_configs_build_is_also_mmcvs_layer(name):
    layer = MODELS.build(dict(type=name, in_channels=4, out_channels=4, kernel_size=3, padding=1))
    base = mmcv.ops.DeformConv2d if name == "DCN" else mmcv.ops.ModulatedDeformConv2d
    assert isinstance(layer, base)
    assert repr(layer).startswith(f"{LAYER_TYPES[name].__name__}(\n  4, 4, kernel_size=(3, 3)")
    nn.init.normal_(layer.conv_offset.bias)
    x = torch.randn(1, 4, 5, 5)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer)
        assert torch.equal(copied(x), layer(x))


def test_loading_a_checkpoint_logs_nothing_for_each_layer():
    layer = MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=3))
    logger, handler, records = MMLogger.get_current_instance(), logging.Handler(), []
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        layer.load_state_dict(layer.state_dict())
    finally:
        logger.removeHandler(handler)
    assert not records


def test_mmengine_treats_the_offset_branch_apart():
    model = nn.Sequential(
        MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=3)),
        MODELS.build(dict(type="DCNv2", in_channels=4, out_channels=4, kernel_size=3)),
    )
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="SGD", lr=1.0),
            paramwise_cfg=dict(dcn_offset_lr_mult=0.1, bias_lr_mult=2.0),
        ),
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[group["params"][0]]: group["lr"] for group in wrapper.optimizer.param_groups}
    assert rates == {
        "0.weight": 1.0,
        "0.conv_offset.weight": 0.1,
        "0.conv_offset.bias": 0.1,
        "1.weight": 1.0,
        "1.bias": 2.0,
        "1.conv_offset.weight": 0.1,
        "1.conv_offset.bias": 0.1,
    }


# ---------------------------------------------------------------------------------- DCNv3 and DCNv4


@pytest.mark.parametrize("scope", ["", "mmdcn."])
@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
def test_backbones_take_v3_and_v4(name, scope):
    registry = pytest.importorskip("mmdet.registry").MODELS
    backbone = registry.build(
        dict(
            type="mmdet.ResNet",
            depth=50,
            base_channels=8,
            stem_channels=8,
            dcn=dict(type=scope + name, deform_groups=2, fallback_on_stride=False),
            stage_with_dcn=(False, True, True, True),
            zero_init_residual=False,  # Else nothing but the shortcuts passes a gradient at first.
        )
    )
    backbone.init_weights()
    built = [m for m in backbone.modules() if isinstance(m, getattr(layers, name))]
    assert len(built) == 4 + 6 + 3
    assert {layer.stride for layer in built} == {(1, 1), (2, 2)}
    backbone.train()
    levels = backbone(torch.randn(2, 3, 64, 64))
    assert [tuple(level.shape[2:]) for level in levels] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    sum(level.square().mean() for level in levels).backward()
    for layer in built:
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        branch = layer.offset if name == "DCNv3" else layer.offset_mask
        assert branch.weight.grad.any()


@pytest.mark.parametrize("name", ["DCNv3", "DCNv4"])
def test_conv_module_takes_v3_and_v4(name):
    module = mmcv.cnn.ConvModule(
        8, 6, 3, padding=1, groups=2, conv_cfg=dict(type=name), norm_cfg=dict(type="BN")
    )
    assert module.conv.output_proj.bias is None
    assert module(torch.randn(2, 8, 6, 6)).shape == (2, 6, 6, 6)


# ------------------------------------------------------------------------- one and three dimensions


@pytest.mark.parametrize("scope", ["", "mmdcn."])
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("DCN1d", layers.DeformConv1dPack),
        ("DCNv2_1d", layers.ModulatedDeformConv1dPack),
        ("DCN3d", layers.DeformConv3dPack),
        ("DCNv2_3d", layers.ModulatedDeformConv3dPack),
    ],
)
def test_conv_module_takes_other_ranks(name, layer, scope):
    rank = layer.rank
    module = mmcv.cnn.ConvModule(
        4, 6, 3, padding=1, conv_cfg=dict(type=scope + name), norm_cfg=dict(type=f"BN{rank}d")
    )
    assert type(module.conv) is layer
    module(torch.randn(2, 4, *(5, 6, 7)[:rank])).square().sum().backward()
    assert module.conv.conv_offset.weight.grad.any()


# -------------------------------------------------------------------------------------- RoI pooling


ROI_LAYER_TYPES = {
    "DeformRoIPool": layers.DeformRoIPool,
    "DeformRoIPoolPack": layers.DeformRoIPoolPack,
    "ModulatedDeformRoIPoolPack": layers.ModulatedDeformRoIPoolPack,
}
ROIS = torch.tensor([[0, 4.0, 4.0, 40.0, 60.0], [1, 20.0, 10.0, 120.0, 90.0]])


def roi_layer(name: str) -> dict:
    config = dict(type=name, output_size=3, sampling_ratio=2)
    return config if name == "DeformRoIPool" else config | dict(output_channels=4)


@pytest.mark.parametrize("name", ROI_LAYER_TYPES)
def test_roi_extractors_of_mmdet_build_our_layers(name):
    registry = pytest.importorskip("mmdet.registry").MODELS
    # A runner before may have left another scope.
    with DefaultScope.overwrite_default_scope("mmdet"):
        extractor = registry.build(
            dict(
                type="SingleRoIExtractor",
                roi_layer=roi_layer(name),
                out_channels=4,
                featmap_strides=[4, 8],
            )
        )
    for layer, stride in zip(extractor.roi_layers, (4, 8)):
        assert isinstance(layer, ROI_LAYER_TYPES[name])
        assert layer.spatial_scale == 1 / stride
    levels = [torch.randn(2, 4, 128 // s, 128 // s, requires_grad=True) for s in (4, 8)]
    passes = 1 if name == "DeformRoIPool" else 2
    with KernelCalls() as calls:
        pooled = extractor(levels, ROIS)
        pooled.square().sum().backward()
    assert pooled.shape == (2, 4, 3, 3)
    assert (calls.roi_pool_forward, calls.roi_pool_backward, calls.mmcv) == (passes, passes, 0)
    assert extractor(levels, ROIS[:0]).shape == (0, 4, 3, 3)

    plugin.uninstall()
    assert getattr(mmcv.ops, name).__module__ == "mmcv.ops.deform_roi_pool"


@pytest.mark.parametrize("scope", ["", "mmdcn."])
@pytest.mark.parametrize("name", ROI_LAYER_TYPES)
def test_roi_layers_are_registered(name, scope):
    layer = MODELS.build(roi_layer(name) | dict(type=scope + name))
    assert isinstance(layer, ROI_LAYER_TYPES[name])
    theirs = sys.modules["mmcv.ops.deform_roi_pool"]
    # Of mmcv's classes, and of those that have taken their names.
    for module in (theirs, mmcv.ops):
        assert isinstance(layer, getattr(module, name))
        assert isinstance(layer, module.DeformRoIPool)
    assert repr(layer).startswith(f"{name}(")
    x = torch.randn(2, 4, 16, 16)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(copied) is type(layer)
        assert torch.equal(copied(x, ROIS), layer(x, ROIS))


@pytest.mark.parametrize("name", ROI_LAYER_TYPES)
def test_mmcvs_own_roi_layers_run_our_kernels(name):
    theirs = getattr(sys.modules["mmcv.ops.deform_roi_pool"], name)
    arguments = {key: value for key, value in roi_layer(name).items() if key != "type"}
    layer, ours = theirs(**arguments), ROI_LAYER_TYPES[name](**arguments)
    ours.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with KernelCalls() as calls:
        pooled = layer(x, ROIS)
        pooled.sum().backward()
    passes = 1 if name == "DeformRoIPool" else 2
    assert (calls.roi_pool_forward, calls.roi_pool_backward, calls.mmcv) == (passes, passes, 0)
    assert torch.equal(pooled, ours(x, ROIS))


def test_roi_pooling_runs_on_the_reference_where_no_kernels_run(monkeypatch):
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    expected = mmcv.ops.deform_roi_pool(x, ROIS, None, 3, 0.125, 2)
    switch_off(monkeypatch, "deform_conv2d")
    with KernelCalls() as calls:
        actual = mmcv.ops.deform_roi_pool(x, ROIS, None, 3, 0.125, 2)
        actual.sum().backward()
    assert (calls.roi_pool_forward, calls.roi_pool_backward, calls.mmcv) == (0, 0, 0)
    torch.testing.assert_close(actual, expected)
