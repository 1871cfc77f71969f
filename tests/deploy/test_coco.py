"""Exported files on photographs: `MMDCN_COCO` names a folder with COCO's `val2017`."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from mmengine.dataset import pseudo_collate

from mmdcn.deploy.comparison import LEAST_MATCHED, match
from mmdcn.deploy.detector import EndToEnd
from mmdcn.deploy.evaluation import ExportedDetector
from mmdcn.engine import export
from mmdcn.files import images_in

from . import tiny

FOLDER = Path(os.environ.get("MMDCN_COCO", ""), "val2017")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("plugin_in_mmdet"),
    pytest.mark.skipif(
        "MMDCN_COCO" not in os.environ, reason="MMDCN_COCO names no folder with photographs"
    ),
]

IMAGES = 16
# Photographs have larger features than noise. Of VFNet an exponential of them is the box; and its
# scores and GFL's are the sigmoid's alone, which is the same in float32 for all that is far up.
SPREADS = {"vfnet_reg": 0.01, "vfnet_reg_refine": 0.01, "vfnet_cls": 0.1, "gfl_cls": 0.1}


def pictures(cfg, count):
    """Photographs as a config's pipeline gives them."""
    steps = [step for step in get_test_pipeline_cfg(cfg) if "LoadAnn" not in step["type"]]
    pipeline = Compose(steps)
    paths = list(images_in(FOLDER))[:count]
    return [pipeline(dict(img_path=str(path), img_id=0)) for path in paths]


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_half_precision_in_a_photograph(tmp_path, name):
    """The export compares the file's detections with PyTorch's in float32."""
    cfg = tiny.config(name, "DCNv2")
    network = EndToEnd(tiny.build(cfg, **SPREADS))
    given = network.inputs_of(pseudo_collate(pictures(cfg, 1)))
    verified = export.export(network, [given], tmp_path / "model.onnx", 0.01, half=True)
    assert verified.comparison.detections > 50


@pytest.mark.parametrize("with_preprocessing", [False, True])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_detections_in_photographs(tmp_path, name, with_preprocessing):
    """In batches of two, through mmdet's pipeline, in pixels of the photographs."""
    cfg = tiny.config(name, "DCNv2")
    detector = tiny.build(cfg, **SPREADS)
    photographs = pictures(cfg, IMAGES)
    batches = [pseudo_collate(photographs[i : i + 2]) for i in range(0, len(photographs), 2)]
    with torch.no_grad():
        expected = [sample for batch in batches for sample in detector.test_step(batch)]
    path = tmp_path / "model.onnx"
    network = EndToEnd(detector, with_preprocessing)
    assert export.export(network, [network.inputs_of(pseudo_collate(photographs[:1]))], path, 0.01)
    exported = ExportedDetector(str(path), cfg.model.data_preprocessor)
    actual = [sample for batch in batches for sample in exported.test_step(batch)]
    same = detections = 0
    for theirs, ours in zip(expected, actual, strict=True):
        keys = ("bboxes", "scores", "labels")
        one, other = ([s.pred_instances[key] for key in keys] for s in (theirs, ours))
        places = match(one, other)
        same += int((places >= 0).sum())
        detections += max(len(one[0]), len(other[0]))
        if "masks" in theirs.pred_instances:
            found = (places >= 0).numpy()
            pasted = ours.pred_instances.masks[places[found]].numpy()
            assert np.mean(pasted == theirs.pred_instances.masks[found].numpy()) > 0.999
    assert detections > 20 * len(photographs)
    assert same >= LEAST_MATCHED * detections
