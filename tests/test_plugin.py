"""What the toolbox sees. Which kernel ran is told by counting calls, not by names."""

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")

import mmcv.cnn
import mmcv.ops
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from mmdcn import layers, ops, plugin
from tests.kernel_calls import KernelCalls
from tests.switched_off import switch_off

ROOT = Path(__file__).resolve().parents[1]
LAYER_TYPES = {
    "DCN": layers.DeformConv2dPack,
    "DCNv2": layers.ModulatedDeformConv2dPack,
    "DeformConv2d": layers.DeformConv2d,
    "DeformConv2dPack": layers.DeformConv2dPack,
    "ModulatedDeformConv2d": layers.ModulatedDeformConv2d,
    "ModulatedDeformConv2dPack": layers.ModulatedDeformConv2dPack,
}


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


def inputs_for(layer: nn.Module) -> list[torch.Tensor]:
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    if hasattr(layer, "conv_offset"):
        return [x]
    inputs = [x, torch.randn(2, 18, 6, 6)]
    return [*inputs, torch.rand(2, 9, 6, 6)] if "Modulated" in type(layer).__name__ else inputs


# -------------------------------------------------------------------------------------- registry


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


def test_the_scope_needs_no_import():
    code = """
from mmengine.registry import MODELS
print(MODELS.get("mmdcn.DCN").__mro__)
"""
    assert "mmdcn.layers.deform_conv.DeformConv2dPack" in python("-c", code).stdout


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


# ------------------------------------------------------------------------------ DCNv3 and DCNv4


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


# ----------------------------------------------------------------------------------- RoI pooling

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


# ------------------------------------------------------------------------------------- functions


def problem(dtype=torch.float64, size=6, offset_size=6):
    torch.manual_seed(1)
    x = torch.randn(2, 8, size, size, dtype=dtype)
    offset = torch.randn(2, 2 * 18, offset_size, offset_size, dtype=dtype)
    mask = torch.rand(2, 2 * 9, offset_size, offset_size, dtype=dtype)
    weight = torch.randn(6, 4, 3, 3, dtype=dtype)
    return [t.requires_grad_() for t in (x, offset, mask, weight)], torch.randn(6, dtype=dtype)


def both(function) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`function`, which returns tensors, with our kernels and with mmcv's."""
    with KernelCalls() as calls:
        ours = function()
    assert calls.forward
    assert not calls.mmcv
    plugin.uninstall()
    with KernelCalls() as calls:
        theirs = function()
    assert calls.mmcv
    assert not calls.forward
    return ours, theirs


def test_v1_function_as_mmcvs():
    (x, offset, _, weight), _ = problem()

    def run():
        output = mmcv.ops.deform_conv2d(x, offset, weight, (1, 1), 1, 1, 2, 2, False, 2)
        return [output, *torch.autograd.grad(output.square().sum(), (x, offset, weight))]

    for mine, expected in zip(*both(run)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("size", "offset_size"), [(6, 6), (6, 9)])
def test_v2_function_as_mmcvs(size, offset_size):
    # Larger offsets than the output: what mmdet's DyHead passes.
    (x, offset, mask, weight), bias = problem(size=size, offset_size=offset_size)

    def run():
        output = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 2, 2)
        return [output, *torch.autograd.grad(output.square().sum(), (x, offset, mask, weight))]

    for mine, expected in zip(*both(run)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(12, 16), (13, 9)])
def test_dyhead_as_with_mmcv(size):
    registry = pytest.importorskip("mmdet.registry").MODELS
    neck = registry.build(
        dict(
            type="mmdet.DyHead",
            in_channels=16,
            out_channels=16,
            num_blocks=2,
            zero_init_offset=False,
        )
    ).double()
    for block in neck.dyhead_blocks:
        nn.init.normal_(block.spatial_conv_offset.weight, std=0.2)
    height, width = size
    levels = [
        torch.randn(2, 16, -(-height // step), -(-width // step), dtype=torch.float64)
        for step in (1, 2, 4)
    ]
    for mine, expected in zip(*both(lambda: neck(levels))):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_functions_compute_in_the_offsets_dtype():
    (x, offset, mask, weight), bias = problem(torch.float32)
    output = mmcv.ops.deform_conv2d(x, offset.half(), weight, 1, 1, 1, 2, 2)
    assert output.dtype == torch.float16
    output = mmcv.ops.modulated_deform_conv2d(
        x.half(), offset, mask.half(), weight, bias, 1, 1, 1, 2, 2
    )
    assert output.dtype == torch.float32
    expected = ops.deform_conv2d(
        x.half().float(), offset, weight, bias, 1, 1, 1, mask.half().float()
    )
    torch.testing.assert_close(output, expected)


def test_functions_take_keywords():
    (x, offset, mask, weight), bias = problem()
    torch.testing.assert_close(
        mmcv.ops.deform_conv2d(
            x, offset, weight, padding=1, groups=2, deform_groups=2, im2col_step=1
        ),
        ops.deform_conv2d(x, offset, weight, padding=1),
    )
    torch.testing.assert_close(
        mmcv.ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, padding=1, groups=2, deform_groups=2
        ),
        ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(groups=1), "groups: expected .* 8 / 4, got 1"),
        (dict(deform_groups=1), "deform_groups: expected .* 36 / 18, got 1"),
        (dict(stride=0), "stride"),
        (dict(padding=2), "offset: expected shape"),
    ],
)
@pytest.mark.parametrize("function", ["deform_conv2d", "modulated_deform_conv2d"])
def test_functions_refuse(function, arguments, message):
    (x, offset, mask, weight), _ = problem()
    tensors = (x, offset, weight) if function == "deform_conv2d" else (x, offset, mask, weight)
    good = dict(padding=1, groups=2, deform_groups=2)
    with pytest.raises(ValueError, match=message):
        getattr(mmcv.ops, function)(*tensors, **(good | arguments))


def test_v1_function_refuses_a_bias_tensor():
    (x, offset, _, weight), bias = problem()
    with pytest.raises(ValueError, match="bias: expected False"):
        mmcv.ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2, bias)


# ---------------------------------------------------------- where our kernels do not run


@pytest.mark.parametrize("name", ["deform_conv2d", "modulated_deform_conv2d"])
def test_stand_ins_run_on_mmcvs_kernels_where_ours_do_not_run(name, monkeypatch):
    """As before the plugin took mmcv's functions away: forward, backward, and the same numbers."""
    (x, offset, mask, weight), _ = problem()
    tensors = (x, offset, weight) if name == "deform_conv2d" else (x, offset, mask, weight)

    def run():
        function = getattr(mmcv.ops, name)
        output = function(*tensors, padding=1, groups=2, deform_groups=2)
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    expected = run()
    switch_off(monkeypatch, "deform_conv2d")
    with KernelCalls() as calls:
        actual = run()
    assert (calls.forward, calls.backward) == (0, 0)
    assert calls.mmcv == (3 if name == "deform_conv2d" else 2)
    for mine, theirs in zip(actual, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "mmcvs"])
@pytest.mark.parametrize("name", ["DCN", "DCNv2"])
def test_layers_run_on_mmcvs_kernels_where_ours_do_not_run(name, theirs, monkeypatch):
    """What configs build, and mmcv's own layers; without the plugin's functions too."""
    classes = {"DCN": mmcv.ops.DeformConv2dPack, "DCNv2": mmcv.ops.ModulatedDeformConv2dPack}
    build = classes[name] if theirs else MODELS.get(name)
    layer = build(4, 4, 3, padding=1)
    x = torch.randn(33, 4, 5, 5, requires_grad=True)  # no multiple of mmcv's im2col_step
    expected = layer(x)
    switch_off(monkeypatch, "deform_conv2d")
    for _ in range(1 if theirs else 2):
        with KernelCalls() as calls:
            actual = layer(x)
            actual.sum().backward()
        assert (calls.forward, calls.backward) == (0, 0)
        assert calls.mmcv > 1
        torch.testing.assert_close(actual, expected)
        plugin.uninstall()


def test_roi_pooling_runs_on_the_reference_where_no_kernels_run(monkeypatch):
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    expected = mmcv.ops.deform_roi_pool(x, ROIS, None, 3, 0.125, 2)
    switch_off(monkeypatch, "deform_conv2d")
    with KernelCalls() as calls:
        actual = mmcv.ops.deform_roi_pool(x, ROIS, None, 3, 0.125, 2)
        actual.sum().backward()
    assert (calls.roi_pool_forward, calls.roi_pool_backward, calls.mmcv) == (0, 0, 0)
    torch.testing.assert_close(actual, expected)


# --------------------------------------------------------------- taking over, and giving back


@pytest.mark.parametrize("order", ["before", "after"])
def test_toolbox_code_runs_our_kernels_whenever_it_was_imported(order):
    pytest.importorskip("mmdet")
    lines = python("-m", "tests.toolbox_script", order).stdout.splitlines()
    result = json.loads(lines[-1].removeprefix("RESULT "))
    for name, calls in result["user"].items():
        assert calls == {"forward": 1, "backward": 1, "mmcv": 0}, name
    for name, calls in result["heads"].items():
        expected = calls.pop("expected")
        assert calls == {"forward": expected, "backward": expected, "mmcv": 0}, name
    assert result["isinstance"] == [True, True]
    places = result["report"]["mmcv.ops.deform_conv2d"]
    assert {"mmcv.ops.deform_conv2d", "mmcv.ops.saconv.deform_conv2d", "user_module.v1"} <= {
        *places
    }
    assert "mmdet.models.dense_heads.tood_head.deform_conv2d" in places

    for name, calls in result["uninstalled"].items():
        assert calls["forward"] == calls["backward"] == 0, name
        assert calls["mmcv"] > 0, name
    if order == "before":
        assert result["changed"] == result["added"] == []

    takeovers = [line for line in lines if "mmdcn.plugin.report()" in line]
    assert len(takeovers) == 1


def test_uninstall_gives_back_and_install_takes_over_again():
    theirs = {"DCN": mmcv.ops.DeformConv2dPack, "DCNv2": mmcv.ops.ModulatedDeformConv2dPack}
    layer = mmcv.ops.DeformConv2dPack(4, 4, 3)
    x = torch.randn(1, 4, 5, 5)
    for _ in range(2):
        plugin.uninstall()
        plugin.uninstall()
        assert not plugin.report().installed
        for name in LAYER_TYPES:
            assert MODELS.module_dict.get(name) is theirs.get(name)
            assert issubclass(MODELS.get(f"mmdcn.{name}"), LAYER_TYPES[name])
        with KernelCalls() as calls:
            layer(x)
        assert (calls.forward, calls.mmcv) == (0, 1)

        plugin.install()
        plugin.install()
        assert plugin.report().installed
        for name in LAYER_TYPES:
            assert MODELS.get(name) is MODELS.get(f"mmdcn.{name}")
        with KernelCalls() as calls:
            layer(x)
        assert (calls.forward, calls.mmcv) == (1, 0)


def test_uninstall_leaves_what_somebody_else_registered():
    class Another(nn.Module):
        pass

    MODELS.register_module(name="DCN", module=Another, force=True)
    try:
        assert "Another" in plugin.report().layers["DCN"]
        plugin.uninstall()
        assert MODELS.get("DCN") is Another
    finally:
        MODELS.register_module(name="DCN", module=mmcv.ops.DeformConv2dPack, force=True)


def test_checkpoints_with_old_keys_load_while_it_is_installed():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.ReLU(), layers.DeformConv2dPack(4, 4, 3))

    source = model()
    nn.init.normal_(source[1].conv_offset.weight)
    old = {
        key.replace("1.conv_offset", "1_offset"): value
        for key, value in source.state_dict().items()
    }
    assert "1_offset.weight" in old
    for _ in range(2):
        plugin.install()
        assert plugin.report().old_keys
        taught = model()
        taught.load_state_dict(dict(old), strict=True)
        assert torch.equal(taught[1].conv_offset.weight, old["1_offset.weight"])

        plugin.uninstall()
        assert not plugin.report().old_keys
        with pytest.raises(RuntimeError, match=r"Missing key.*1\.conv_offset\.weight"):
            model().load_state_dict(dict(old))
        taught.load_state_dict(dict(old), strict=True)


def test_nothing_of_ours_is_called_for_every_module_once_it_is_uninstalled():
    code = """
import mmdcn
from torch.nn.modules import module
print(len(module._global_module_registration_hooks))
mmdcn.plugin.uninstall()
print(len(module._global_module_registration_hooks))
"""
    assert python("-c", code).stdout.splitlines()[-2:] == ["1", "0"]


def test_report_reads_well():
    text = str(plugin.report())
    assert text.startswith("mmdcn's plugin is installed.")
    assert "  DCN: mmdcn.plugin.DeformConv2dPack" in text
    assert "mmcv.ops.modulated_deform_conv2d: replaced in\n" in text
    assert "Checkpoints load as plain data only." in text
    assert "Former names of offset branches in them load." in text
    plugin.uninstall()
    text = str(plugin.report())
    assert text.startswith("mmdcn's plugin is not installed.")
    assert "  DCN: mmcv.ops.deform_conv.DeformConv2dPack" in text
    assert "  DeformConv2d: nothing" in text
    assert "mmcv.ops.deform_conv2d: left alone" in text
    assert "Checkpoints load as mmengine does by itself." in text
    assert "Former names of offset branches in them do not load." in text


def test_other_ranks_are_silent():
    assert python("-c", "import mmdcn", RANK="1").stdout == ""


def test_old_arguments_are_logged_by_mmengine_once():
    code = """
import mmdcn
from mmengine.registry import MODELS
for _ in range(3):
    MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=3, im2col_step=8))
"""
    run = python("-c", code)
    lines = [line for line in run.stdout.splitlines() if "im2col_step" in line]
    assert len(lines) == 1
    assert "mmengine - WARNING" in lines[0].replace("\x1b[33m", "").replace("\x1b[0m", "")
    assert run.stderr == ""


def test_mmcv_without_compiled_operators_gets_one_sentence():
    code = """
import sys
sys.modules["mmcv._ext"] = None  # As in mmcv-lite: importing it fails.
import torch
import mmdcn
from mmengine.registry import MODELS
layer = MODELS.build(dict(type="DCNv2", in_channels=4, out_channels=4, kernel_size=3))
print("SHAPE", tuple(layer(torch.ones(1, 4, 5, 5)).shape))
print("MENDING", mmdcn.plugin.report().mmcv_problem is not None)
mmdcn.plugin.uninstall()
print("LEFT", [name for name in mmdcn.plugin.LAYERS if name in MODELS.module_dict])
"""
    run = python("-c", code)
    sentence, *rest = run.stdout.splitlines()
    assert rest == ["SHAPE (1, 4, 3, 3)", "MENDING True", "LEFT []"]
    for word in ("mmcv.ops does not load", "mmcv-lite", "setuptools<81", "--no-build-isolation"):
        assert word in sentence
    assert run.stderr == ""
