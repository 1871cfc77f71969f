"""`tools/export_onnx.py` as a command, and its file in `tools/test.py`."""

import json
import re
import sys

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.fileio import load
from PIL import Image

from mmdcn.deploy.comparison import LEAST_MATCHED, match
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
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=64, num_outs=3),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=1,
        strides=[8, 16, 32],
        regress_ranges=((-1, 64), (64, 128), (128, 1e8))))
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
    assert [value.name for value in model.graph.input] == ["images", "image_sizes"]
    assert [value.name for value in model.graph.output] == ["boxes", "scores", "labels"]
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["mmdcn.classes"] == ["square", "bar"]
    assert about["mmdcn.score_thr"] == 0.05 and about["mmdcn.max_per_img"] == 100
    assert about["mmdcn.versions"]["torch"] == torch.__version__


def test_the_file_is_evaluated_as_the_checkpoint_is(project, trained, exported, run_here, capsys):
    """In mmdet's pixels of the image file, through its data loader and its metric."""
    results, printed = [], []
    for name, model in (("torch", trained / "epoch_1.pth"), ("onnx", "out/model.onnx")):
        run_here(
            *("test.py", project.config, model, "--work-dir", "tested"),
            *(
                "--out",
                f"{name}.pkl",
                "--cfg-options",
                "test_dataloader.dataset.pipeline.1.scale=(96,80)",
            ),
        )
        results.append(load(project.root / f"{name}.pkl"))
        printed.append(re.findall("bbox_mAP_copypaste: .*", capsys.readouterr().out))
    assert printed[0] == printed[1] != []
    for expected, actual in zip(*results):
        ours, theirs = (
            [sample["pred_instances"][key] for key in ("bboxes", "scores", "labels")]
            for sample in (actual, expected)
        )
        assert len(ours[0]) == len(theirs[0]) > 10
        assert (match(theirs, ours) >= 0).float().mean() >= LEAST_MATCHED


def test_the_file_is_held_against_its_checkpoint(project, trained, exported, run_here, capsys):
    checkpoint = trained / "epoch_1.pth"
    command = ("test.py", project.config, "out/model.onnx", "--work-dir", "held", "--against")
    run_here(*command, checkpoint, "--seconds", "0.01")
    printed = capsys.readouterr().out
    assert f"|  | out/model.onnx | {checkpoint}, PyTorch | difference |" in printed
    row = re.search(r"\| coco/bbox_mAP \| (\S+) \| (\S+) \| (\S+) \|", printed)
    # One has no AP without detections.
    assert 0 <= float(row[1]) <= 1 and abs(float(row[1]) - float(row[2])) <= 0.001
    speeds = re.search(r"\| images/s \| (\S+) \| (\S+) \| (\S+)× \|", printed)
    assert float(speeds[3]) == pytest.approx(float(speeds[1]) / float(speeds[2]), abs=0.02)
    for first, second in ((checkpoint, checkpoint), ("out/model.onnx", "out/model.onnx")):
        with pytest.raises(SystemExit):
            run_here("test.py", project.config, first, "--against", second)
        assert "--against: expected a checkpoint to hold an exported" in capsys.readouterr().err


def test_a_file_is_opened_once(project, exported, run_here, monkeypatch):
    from mmdcn import machine

    opened, session = [], machine.onnxruntime_session
    monkeypatch.setattr(
        machine, "onnxruntime_session", lambda *given: opened.append(given) or session(*given)
    )
    run_here("test.py", project.config, "out/model.onnx", "--work-dir", "tested")
    assert len(opened) == 1
    run_here("test.py", project.config, "out/model.onnx", "--work-dir", "tested")
    assert len(opened) == 2  # it may be another by now


def test_a_file_that_cannot_be_evaluated(project, trained, exported, run_here, capsys):
    (project.root / "no.onnx").write_text("no model")
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    copy = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([copy], "copy", values[:1], values[1:])
    opset = onnx.helper.make_opsetid("", 20)
    other = onnx.helper.make_model(graph, ir_version=10, opset_imports=[opset])
    onnx.save(other, project.root / "other.onnx")
    model = onnx.load(project.root / "out" / "model.onnx")
    for entry in model.metadata_props:
        if entry.key == "mmdcn.classes":
            entry.value = json.dumps(["bar", "square"])
    onnx.save(model, project.root / "reversed.onnx")
    for name, expected in (
        ("no", "onnxruntime cannot read no.onnx: "),
        ("other", r"other.onnx: expected a whole detector, .* got inputs \['x'\] .*--raw"),
        ("reversed", "reversed.onnx detects 2 classes, bar, square, .* the data has 2, square"),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{expected}"):
            run_here("test.py", project.config, f"{name}.onnx", "--work-dir", "tested")
    for option in (["--tta"], ["--launcher", "pytorch"]):
        with pytest.raises(SystemExit):
            run_here("test.py", project.config, "out/model.onnx", *option)
        assert f"{option[0]}: " in capsys.readouterr().err


def test_what_is_printed(exported):
    assert "comparing on wide.png, high.png" in exported.stdout
    assert "writing the network" in exported.stdout
    assert "images, image_sizes -> boxes, scores, labels" in exported.stdout
    found = re.search(r"(\d+) of (\d+) detections within 0.01 pixels", exported.stdout)
    assert int(found[2]) > 30 and int(found[1]) >= 0.99 * int(found[2])
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
        *("--raw", "--seconds", "0.1", "--cfg-options"),
        "test_dataloader.dataset.pipeline.1.scale=(128,96)",
    )
    printed = capsys.readouterr().out
    assert "comparing on 000000.jpg, 000001.jpg, 000002.jpg" in printed
    error = re.search(r"largest error: (\S+) of the largest element \(bbox_head\S+\)", printed)
    assert 0 < float(error[1]) < 1e-4
    outputs = [value.name for value in onnx.load(project.root / "one_stage.onnx").graph.output]
    names = ("cls_scores", "bbox_preds", "centernesses")
    assert outputs == [f"bbox_head.{name}.{level}" for name in names for level in range(3)]


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
    monkeypatch.setattr(
        export, "_write", lambda network, example, path, half: onnx.save(EMPTY, path)
    )
    run_here(
        *("export_onnx.py", project.config, trained / "epoch_1.pth", "-o", "unverified.onnx"),
        *("--images", project.data / "images" / "val1.png", "--no-verify", "--raw"),
    )
    printed = capsys.readouterr().out
    assert "wrote unverified.onnx: images, boxes" in printed
    assert "compar" not in printed and "error" not in printed
    assert (project.root / "unverified.onnx").is_file()
