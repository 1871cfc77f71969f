"""How the plugin takes over the toolbox's names and functions, gives them back, and reports it."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("mmcv.ops")

import mmcv.ops
from mmengine.registry import MODELS

from mmdcn import layers, plugin
from tests.kernel_calls import KernelCalls
from tests.layer_types import LAYER_TYPES
from tests.programs import run_python


@pytest.fixture(autouse=True)
def installed():
    plugin.install()
    yield
    plugin.install()


@pytest.mark.parametrize("order", ["before", "after"])
def test_toolbox_code_runs_our_kernels_whenever_it_was_imported(order):
    pytest.importorskip("mmdet")
    lines = run_python("-m", "tests.toolbox_script", order).splitlines()
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
    assert run_python("-c", code).splitlines()[-2:] == ["1", "0"]


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
    assert run_python("-c", "import mmdcn", RANK="1") == ""


def test_old_arguments_are_logged_by_mmengine_once():
    code = """
import mmdcn
from mmengine.registry import MODELS
for _ in range(3):
    MODELS.build(dict(type="DCN", in_channels=4, out_channels=4, kernel_size=3, im2col_step=8))
"""
    taken_over, *lines = run_python("-c", code).splitlines()
    assert "mmdcn.plugin.report()" in taken_over
    assert len(lines) == 1 and "im2col_step" in lines[0]
    assert "mmengine - WARNING" in lines[0].replace("\x1b[33m", "").replace("\x1b[0m", "")


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
    sentence, *rest = run_python("-c", code).splitlines()
    assert rest == ["SHAPE (1, 4, 3, 3)", "MENDING True", "LEFT []"]
    for word in ("mmcv.ops does not load", "mmcv-lite", "setuptools<81", "--no-build-isolation"):
        assert word in sentence


def test_the_scope_needs_no_import():
    code = """
from mmengine.registry import MODELS
print(MODELS.get("mmdcn.DCN").__mro__)
"""
    assert "mmdcn.layers.deform_conv.DeformConv2dPack" in run_python("-c", code)
