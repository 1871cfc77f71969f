"""The benchmark of whole detectors: the same work on either kernels, or no timing."""

import dataclasses

import pytest
import torch

pytest.importorskip("mmdet")

from mmdcn import plugin, timing
from mmdcn.benchmark import BenchmarkError, detectors
from mmdcn.layers import ModulatedDeformConv2d
from tests import small_detector
from tests.kernel_calls import KernelCalls

PLAIN = f"""
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
{small_detector.MODEL}
"""
DEFORMABLE = """
_base_ = './plain.py'
custom_imports = dict(imports=['mmdcn'], allow_failed_imports=False)
model = dict(backbone=dict(
    dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
    stage_with_dcn=(False, False, False, True)))
"""


@pytest.fixture
def configs(tmp_path):
    paths = [tmp_path / "plain.py", tmp_path / "deformable.py"]
    for path, text in zip(paths, (PLAIN, DEFORMABLE)):
        path.write_text(text)
    return paths


def settings(configs, **more) -> detectors.Settings:
    budget = timing.Budget(seconds=0.001, fewest=2, most=2)
    return detectors.Settings(configs, size=(96, 64), measure_memory=False, budget=budget, **more)


def test_deformable_against_plain_on_both_kernels(configs):
    plugin.install()
    result = {}
    detectors.run(settings(configs, batches=[2, 1]), result)
    assert plugin.report().installed  # as before
    assert result["complete"]
    plain, ours, theirs = result["cases"][:3]
    assert [(e["batch"], e["config"], e["kernels"], e["deformable"]) for e in result["cases"]] == [
        (batch, *of_batch)
        for batch in (2, 1)
        for of_batch in (
            ("plain", None, False),
            ("deformable", "mmdcn", True),
            ("deformable", "mmcv", True),
        )
    ]
    for entry in result["cases"]:
        assert set(entry["times"]) == {"training", "inference"}
        assert all(len(samples) == 2 for samples in entry["times"].values())
    # The offset branches: 27 channels in three blocks of 64.
    assert ours["parameters"] == theirs["parameters"]
    assert ours["parameters"] - plain["parameters"] == 3 * 27 * (64 * 9 + 1)


def test_each_detector_runs_on_its_own_kernels(configs):
    chosen = settings(configs)
    with detectors.toolbox_quiet():
        (ours, _), (theirs, _) = detectors._detectors_of(configs[1], chosen)
        counted = {}
        # In turns, as they are timed.
        for detector in (theirs, ours, theirs, ours):
            for phase in detectors.PHASES:
                with KernelCalls() as calls:
                    call = detector.call(phase)
                    call.prepare(), call.function()
                # For heads that call mmcv's functions by themselves.
                assert plugin.report().installed == (detector.kernels == "mmdcn")
                counted[detector.kernels, phase] = (calls.forward, calls.backward, calls.mmcv)
    assert counted == {
        ("mmdcn", "training"): (3, 3, 0),
        ("mmdcn", "inference"): (3, 0, 0),
        ("mmcv", "training"): (0, 0, 6),
        ("mmcv", "inference"): (0, 0, 3),
    }


@pytest.mark.parametrize("layer", ["DCN", "DCNv2"])
def test_both_kernels_get_the_same_weights(configs, layer):
    configs[1].write_text(DEFORMABLE.replace("DCNv2", layer))
    # mmcv's DCN takes no image smaller than its kernel: 3 × 3 in the last stage.
    chosen = dataclasses.replace(settings(configs), size=(96, 96))
    with detectors.toolbox_quiet():
        (ours, _), (theirs, _) = detectors._detectors_of(configs[1], chosen)
    weights = theirs.model.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in ours.model.state_dict().items())


def test_iterations_are_all_the_same(configs):
    with detectors.toolbox_quiet():
        detector = detectors.Detector(configs[1], "mmdcn", settings(configs))
        before = {name: value.clone() for name, value in detector.model.state_dict().items()}
        detector.prepare("training")
        assert detector.train() == detector.train()
        assert all(torch.equal(v, before[n]) for n, v in detector.model.state_dict().items())
        # What the deformable layers compute matters.
        layers = [m for m in detector.model.modules() if isinstance(m, ModulatedDeformConv2d)]
        assert len(layers) == 3
        for layer in layers:
            assert all(parameter.grad.any() for parameter in layer.parameters())
            assert layer.conv_offset.bias.std() > 1


def test_mixed_precision_reaches_the_deformable_layers(configs):
    with detectors.toolbox_quiet():
        detector = detectors.Detector(configs[1], "mmdcn", settings(configs, amp=True))
        seen = []
        for module in detector.model.modules():
            if isinstance(module, ModulatedDeformConv2d):
                module.register_forward_hook(lambda m, inputs, output: seen.append(output.dtype))
        detector.prepare("training")
        assert detector.train().isfinite()
        detector.prepare("inference")
        detector.infer()
    assert seen == [torch.bfloat16] * 6


@pytest.mark.parametrize("installed", [True, False])
def test_the_plugin_is_left_as_it_was(installed):
    plugin.install() if installed else plugin.uninstall()
    with detectors.toolbox_quiet():
        plugin.uninstall() if installed else plugin.install()
    assert plugin.report().installed == installed
    plugin.install()


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_kernels_that_disagree_are_not_timed(configs, monkeypatch, factor):
    import mmcv.ops.modulated_deform_conv as module

    with detectors.toolbox_quiet():
        plugin.uninstall()
        theirs = module.modulated_deform_conv2d
        monkeypatch.setattr(module, "modulated_deform_conv2d", lambda *a: factor * theirs(*a))
        with pytest.raises(BenchmarkError, match="expected the same output of backbone"):
            list(detectors._detectors_of(configs[1], settings(configs)))
        monkeypatch.undo()


def test_pretrained_weights_are_not_asked_for(tmp_path):
    path = tmp_path / "pretrained.py"
    path.write_text(
        "model = dict(type='X', pretrained='torchvision://resnet50', neck=[dict(\n"
        "    init_cfg=dict(type='Pretrained', checkpoint='http://nowhere/x.pth'))],\n"
        "    head=dict(init_cfg=dict(type='Normal', std=0.01)))\n"
    )
    model = detectors._load(path).model
    detectors._forget_pretrained(model)
    assert "nowhere" not in str(model) and "resnet50" not in str(model)
    assert model.head.init_cfg.type == "Normal"


def test_files_that_are_no_config_are_named(tmp_path):
    path = tmp_path / "no_config.py"
    path.write_text("answer = 42\n")
    with pytest.raises(BenchmarkError, match=r"--configs: .*no_config.py has no `model`"):
        detectors._load(path)
    path.write_text("answer = \n")
    with pytest.raises(BenchmarkError, match=r"--configs: cannot read .*no_config.py"):
        detectors._load(path)
