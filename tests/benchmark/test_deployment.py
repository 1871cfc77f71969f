"""The benchmark of exported detectors: a file that finds the same is timed beside PyTorch."""

import copy
import json
import sys

import pytest

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

import onnxruntime
import torch

from mmdcn import machine, timing
from mmdcn.benchmark import BenchmarkError, cases, cli, deployment, tables
from mmdcn.deploy.comparison import SINGLE
from mmdcn.engine import export
from tests.deploy import tiny

pytestmark = pytest.mark.skipif(
    bool(machine.onnxruntime_problem()), reason="onnxruntime is too old"
)


@pytest.fixture
def config(tmp_path):
    """RetinaNet with a deformable layer."""
    path = tmp_path / "tiny.py"
    base, text = tiny.CONFIGS["retinanet"]
    dcn = "model['backbone'].update(dcn=dict(type='DCNv2'), stage_with_dcn=(False, True))"
    path.write_text(f"_base_ = 'mmdet::{base}'\n{tiny._BODY}{text}\n{dcn}\n")
    return path


def test_deploy_as_a_command(config, tmp_path, capsys):
    path, report = tmp_path / "deploy.json", tmp_path / "page"
    command = ["deploy", "--configs", str(config), "--size", "96x64", "--batch", "1,2"]
    command += ["--runtimes", "tuned,onnxruntime", "--seconds", "0.001", "--json", str(path)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["complete"] and not result["left_out"]
    assert {"torch", "onnxruntime", "mmdcn"} <= set(result["versions"])
    assert [(e["config"], e["batch"]) for e in result["cases"]] == [("tiny", 1), ("tiny", 2)]
    for entry in result["cases"]:
        taken = {name: timing.median(samples) for name, samples in entry["times"].items()}
        assert list(taken) == ["PyTorch", "tuned", "onnxruntime"]
        assert f"96×64, batch {entry['batch']}, images/s (× PyTorch):" in printed
        assert f"({tables.times(taken['PyTorch'] / taken['onnxruntime'])})" in printed
    assert cli.main(["report", str(path), "--out", str(report)]) == 0
    assert "## Exported detectors" in report.with_suffix(".md").read_text()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "mmdcn.deploy.openvino", raising=False)
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.0")
    left_out = {}
    assert [name for name in cases.RUNTIMES if deployment._is_there(name, left_out)] == [
        "tuned",
        "compiled",
    ]
    assert "pip install" in left_out["openvino"] and "1.25.0" in left_out["onnxruntime"]
    run = dict(benchmark="deployment", cases=[], left_out=left_out, complete=True)
    run |= dict(settings=dict(size=(96, 64), batches=[1], precision="float32", offset_std=2.0))
    said = "\n".join(tables.run_lines(run))
    assert "Left out: onnxruntime: DeformConv needs" in said and "openvino: this needs" in said


def test_wrong_results_are_not_timed(config, tmp_path, monkeypatch, plugin_in_mmdet):
    detector = deployment.EndToEnd(tiny.build(tiny.config("retinanet")))
    batch, sizes = tiny.images((64, 96))
    expected = detector(batch, sizes)
    deployment._check("a file", detector, expected, list(expected), False)
    moved = [expected[0] + 2 * SINGLE.pixels, *expected[1:]]
    with pytest.raises(BenchmarkError, match=r"a file: expected 99% .* Wrong .* not timed"):
        deployment._check("a file", detector, expected, moved, False)


def test_other_depths_inherit(tmp_path):
    path = tmp_path / "faster-rcnn_r50.py"
    settings = deployment.Settings([path], depths=(18, 50))
    shallow, own = deployment._with_depths(settings, tmp_path)
    assert own == path and shallow.name == "faster-rcnn_r18.py"
    assert str(path) in shallow.read_text() and "depth=18" in shallow.read_text()


def test_a_detector_that_cannot_be_exported(config, capsys, monkeypatch):
    def refuse(*given, **options):
        raise export.ExportError("model.bbox_head: PAAHead decodes in a way of its own")

    monkeypatch.setattr(export, "export", refuse)
    command = ["deploy", "--configs", str(config), "--size", "96x64", "--batch", "1"]
    assert cli.main([*command, "--runtimes", "onnxruntime"]) == 1
    assert "error: --configs: model.bbox_head: PAAHead decodes" in capsys.readouterr().err


def test_roi_align_is_our_pooling_without_offsets(plugin_in_mmdet):
    """Put there by the line that the documentation has, or in the benchmark."""
    config = tiny.config("faster-rcnn")
    detector = tiny.build(config)
    config.model.roi_head.bbox_roi_extractor.roi_layer.type = "DeformRoIPool"
    by_config = tiny.build(config)
    by_config.load_state_dict(detector.state_dict())
    replaced = deployment._with_our_pooling(copy.deepcopy(detector))
    batch, _ = tiny.images((64, 96))
    features = detector.extract_feat(batch)[:4]
    corner = torch.rand(200, 2) * torch.tensor([100.0, 70.0]) - 8
    rois = torch.cat([torch.zeros(200, 1), corner, corner + 60 * torch.rand(200, 2)], 1)
    expected, *others = (
        model.roi_head.bbox_roi_extractor(features, rois)
        for model in (detector, by_config, replaced)
    )
    assert expected.abs().max() > 0.01
    for actual in others:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
