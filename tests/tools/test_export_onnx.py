"""`tools/export_onnx.py` as a command."""

import re
import sys

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from PIL import Image

from mmdcn.engine import export
from mmdcn.machine import ONNXRUNTIME_WITH_DEFORM_CONV

from .project import run_tool

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime", minversion=ONNXRUNTIME_WITH_DEFORM_CONV)

EMPTY = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))

ONE_STAGE = """
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
custom_imports = dict(imports=['mmdcn'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        depth=18,
        base_channels=8,
        init_cfg=None,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, False, False, True)),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=1))
"""


@pytest.fixture(scope="module")
def exported(project, trained):
    """Image files of other sizes than the training's, and the command's output."""
    for name, size in (("wide.png", (90, 40)), ("high.png", (50, 61))):
        Image.effect_noise(size, 60).convert("RGB").save(project.root / name)
    return run_tool(
        *("export_onnx.py", project.config, trained / "epoch_1.pth", "-o", "out/model.onnx"),
        *("--images", "wide.png", "high.png", "--seconds", "0.1"),
        cwd=project.root,
    )


def test_two_stage_detector(project, exported):
    assert exported.returncode == 0, exported.stdout
    path = project.root / "out" / "model.onnx"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode == (project.root / "wide.png").stat().st_mode  # not the owner's only
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("DeformConv") == 3 and operators.count("RoiAlign") == 4
    assert [value.name for value in model.graph.input] == ["images", "boxes"]
    levels = [f"rpn_head.{name}.{i}" for name in ("cls_scores", "bbox_preds") for i in range(5)]
    assert [value.name for value in model.graph.output] == [
        *levels,
        "roi_head.cls_score",
        "roi_head.bbox_pred",
    ]
    (images, boxes) = (
        [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input
    )
    assert all((images[0], images[2], images[3], boxes[0]))


def test_what_is_printed(exported):
    assert "comparing on wide.png, high.png" in exported.stdout
    assert "writing the network" in exported.stdout
    error = re.search(r"largest error: (\S+) of the largest element \(r\S+\)", exported.stdout)
    assert 0 < float(error[1]) < 1e-4
    for name in ("PyTorch", "onnxruntime"):
        assert re.search(rf"{name}: \d+ ms for images of 1×3×32×64", exported.stdout)


def test_one_stage_detector_on_generated_images(project, run_here, capsys):
    config = project.root / "one_stage.py"
    config.write_text(ONE_STAGE)
    register_all_modules()
    model = MODELS.build(Config.fromfile(config).model)
    torch.save(dict(state_dict=model.state_dict()), project.root / "one_stage.pth")
    run_here(
        *("export_onnx.py", config, "one_stage.pth", "-o", "one_stage.onnx"),
        *("--seconds", "0.1", "--cfg-options"),
        "test_dataloader.dataset.pipeline.1.scale=(128,96)",
    )
    assert "comparing on 000000.jpg, 000001.jpg, 000002.jpg" in capsys.readouterr().out
    outputs = [value.name for value in onnx.load(project.root / "one_stage.onnx").graph.output]
    names = ("cls_scores", "bbox_preds", "centernesses")
    assert outputs == [f"bbox_head.{name}.{level}" for name in names for level in range(5)]


def test_what_is_not_there_gets_one_message(project, trained, run_here):
    checkpoint = trained / "epoch_1.pth"
    for command, expected in (
        ((project.config, "missing.pth"), "missing.pth"),
        ((project.config, checkpoint, "--images", "missing.png"), "no image 'missing.png'"),
        (("missing.py", checkpoint), "no config file 'missing.py'"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{expected}"):
            run_here("export_onnx.py", *command, "-o", "never.onnx")
    assert not list(project.root.glob("never*"))


def test_without_a_comparison(project, trained, run_here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(export, "_write", lambda network, example, path: onnx.save(EMPTY, path))
    run_here(
        *("export_onnx.py", project.config, trained / "epoch_1.pth", "-o", "unverified.onnx"),
        *("--images", project.data / "images" / "val1.png", "--no-verify"),
    )
    printed = capsys.readouterr().out
    assert "wrote unverified.onnx: images, boxes" in printed
    assert "compar" not in printed and "error" not in printed
    assert (project.root / "unverified.onnx").is_file()
