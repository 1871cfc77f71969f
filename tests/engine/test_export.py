"""The network that is exported, and what cannot be."""

import copy
import sys

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

import onnx
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from mmdcn import machine
from mmdcn.benchmark import deployment
from mmdcn.deploy.comparison import TOLERANCE
from mmdcn.engine import export
from mmdcn.engine.preflight import ConfigError
from tests import small_detector

MASKS = f"""
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdcn'], allow_failed_imports=False)
{small_detector.MODEL}
model['backbone'].update(
    init_cfg=None,
    dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
    stage_with_dcn=(False, False, True, True))
model['roi_head'].update(
    mask_roi_extractor=dict(out_channels=16),
    mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=2))
"""


# With less to export, and without deformable layers still less.
SMALL = {"model.backbone.depth": 18, "model.neck.in_channels": [8, 16, 32, 64]}
PLAIN = {"model.backbone.dcn": None, "model.backbone.stage_with_dcn": (False,) * 4}


def detector(tmp_path, text: str = MASKS, **options) -> nn.Module:
    path = tmp_path / "config.py"
    path.write_text(text)
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    register_all_modules()
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


def inputs(height: int = 96, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and boxes of all sizes in it."""
    corners = torch.rand(20, 2) * torch.tensor([width, height]) * 0.7
    sizes = torch.rand(20, 2) * torch.tensor([width, height]) * 0.3 + 2
    boxes = torch.cat([corners, corners + sizes], dim=1)
    boxes[0] = torch.tensor([0.0, 0.0, 8 * width, 8 * height])  # of the last level
    return torch.randn(1, 3, height, width), bbox2roi([boxes])


def raw_outputs(model, images, boxes):
    features = model.extract_feat(images)
    scores, offsets = model.rpn_head(features)
    results = model.roi_head._bbox_forward(features, boxes)
    masks = model.roi_head._mask_forward(features, boxes)["mask_preds"]
    return [*scores, *offsets, results["cls_score"], results["bbox_pred"], masks]


def test_the_network_is_the_detectors(tmp_path):
    """Bit for bit where RoIs are pooled by our operator, as in the network; else but for that."""
    model = detector(tmp_path).eval()
    images, boxes = inputs()
    with torch.no_grad():
        network = export.Network(copy.deepcopy(model))
        outputs = network(images, boxes)
        by_mmcv = raw_outputs(model, images, boxes)
        expected = raw_outputs(deployment._with_our_pooling(model), images, boxes)
    assert len(outputs) == len(expected) == len(network.output_names)
    for name, output, value, other in zip(network.output_names, outputs, expected, by_mmcv):
        assert torch.equal(output, value), name
        if name.startswith("roi_head"):
            torch.testing.assert_close(output, other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(output, other), name


@pytest.mark.skipif(bool(machine.onnxruntime_problem()), reason="onnxruntime is too old")
def test_masks_and_boxes_of_every_level_are_written(tmp_path):
    network = export.Network(detector(tmp_path, **SMALL))
    path = tmp_path / "model.onnx"
    verified = export.export(network, [inputs(), inputs(64, 70)], path, seconds=0.01)
    assert verified.comparison.largest_error < TOLERANCE
    assert verified.comparison.output in network.output_names
    assert verified.shape == (1, 3, 96, 128)
    assert min(verified.milliseconds.values()) > 0
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    operators = [node.op_type for node in graph.node]
    # Four levels, for boxes and for masks.
    assert operators.count("DeformConv") == 4 and operators.count("RoiAlign") == 8
    assert [value.name for value in graph.input] == ["images", "boxes"]
    levels = [f"rpn_head.{name}.{i}" for name in ("cls_scores", "bbox_preds") for i in range(5)]
    heads = [f"roi_head.{name}" for name in ("cls_score", "bbox_pred", "mask_preds")]
    assert [value.name for value in graph.output] == [*levels, *heads]
    (images, boxes) = ([d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.input)
    assert all((images[0], images[2], images[3], boxes[0]))


def write_nothing(network, example, path, half):
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), path)


def test_an_onnxruntime_without_the_operator_is_refused_before_the_export(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.24.4")
    monkeypatch.setattr(export, "_write", None)
    network, path = export.Network(detector(tmp_path, **SMALL)), tmp_path / "model.onnx"
    with pytest.raises(ConfigError, match=r"onnxruntime 1\.25\.0 or newer, got 1\.24\.4: `pip"):
        export.export(network, [inputs()], path)
    assert not list(tmp_path.glob("model*"))
    # What is not deformable is compared all the same, and all is written if nobody compares.
    monkeypatch.setattr(export, "_write", write_nothing)
    monkeypatch.setattr(export, "_verify", lambda *_: "compared")
    plain = export.Network(detector(tmp_path, **SMALL, **PLAIN))
    assert export.export(plain, [inputs()], path) == "compared"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export.export(network, [inputs()], path, verify=False) is None
    assert path.is_file()
    with pytest.raises(ConfigError, match=r"the export needs .*onnxruntime"):
        export.export(network, [inputs()], path)


@pytest.mark.parametrize(
    ("version", "computes"),
    [
        *((version, True) for version in ("1.25.0", "1.25.0.dev20260101", "1.32.1", "2.0.0")),
        *((version, False) for version in ("1.24.4", "1.9.0", "1.24.0rc1")),
    ],
)
def test_the_first_onnxruntime_with_the_operator(monkeypatch, version, computes):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", version)
    assert (machine.onnxruntime_problem() is None) == computes


class Untranslated(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Traced(nn.Module):
    """Reads the values of its input, which an export does not have."""

    def forward(self, x):
        return x * float(x.detach().numpy().sum())


class OfSmallImages(nn.Module):
    """Computes something else for large images."""

    def forward(self, x):
        return x * 2 if x.shape[2] < 300 else x


class OfTwoImages(nn.Module):
    """Computes something else for other batches."""

    def forward(self, x):
        return x * 2 if len(x) == 2 else x


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (OfTwoImages(), r"network cannot be exported: .* a constant of images.shape\[0\], which"),
        (OfSmallImages(), r"network cannot be exported: .* up to \d+ for images.shape\[2\], which"),
        (Untranslated(), r"bessel_j0 \(prims.bessel_j0.default, in .*neck.extra\) has no"),
        (Traced(), r"neck.extra \(Traced\) cannot be exported"),
    ],
)
def test_what_has_no_counterpart_is_named(tmp_path, module, expected):
    model = detector(tmp_path, **SMALL, **PLAIN)
    model.neck.extra = module
    model.neck.register_forward_hook(lambda neck, args, output: tuple(map(neck.extra, output)))
    path = tmp_path / "model.onnx"
    with pytest.raises(export.ExportError, match=expected):
        export.export(export.Network(model), [inputs()], path)
    assert not list(tmp_path.glob("model*"))


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch):
    network = export.Network(detector(tmp_path, **SMALL, **PLAIN))
    write = export._write

    def write_another(network, example, path, half):
        write(network, example, path, half)
        with torch.no_grad():
            network.detector.rpn_head.rpn_cls.bias += 0.01

    monkeypatch.setattr(export, "_write", write_another)
    with pytest.raises(export.ExportError, match=r"rpn_head.cls_scores.0: .* an error of 0.0"):
        export.export(network, [inputs()], tmp_path / "model.onnx")
    assert not list(tmp_path.glob("model*"))


def test_a_file_that_cannot_be_is_refused_before_it_is_computed(tmp_path):
    network = export.Network(detector(tmp_path, **SMALL, **PLAIN))
    (tmp_path / "taken").write_text("")
    for path, expected in ((tmp_path, "got a folder"), (tmp_path / "taken" / "x", "Not a dir|Fil")):
        with pytest.raises(ConfigError, match=f"cannot write {path}: .*{expected}"):
            export.export(network, [], path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model.roi_head.type": "CascadeRoIHead"}, "StandardRoIHead, got"),
        (
            {"model.roi_head.bbox_roi_extractor.roi_layer.pool_mode": "max"},
            r"bbox_roi_extractor: RoIAlign\(.* has no counterpart",
        ),
    ],
)
def test_other_heads_are_refused(tmp_path, options, expected):
    if "CascadeRoIHead" in options.values():
        text = "_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'\n"
        model = detector(tmp_path, text)
    else:
        model = detector(tmp_path, MASKS, **options)
    with pytest.raises(export.ExportError, match=expected):
        export.Network(model)


def test_other_models_are_refused():
    with pytest.raises(export.ExportError, match=r"one-stage detector, or .*, got Linear"):
        export.Network(nn.Linear(1, 1))


def test_images_of_the_test_set_or_else_generated_ones(tmp_path):
    folder = tmp_path / "set" / "val"
    folder.mkdir(parents=True)
    for name in ("b.jpg", "a.png", "notes.txt", "c.jpg", "d.jpg"):
        (folder / name).touch()
    dataset = dict(data_root=str(tmp_path / "set"), data_prefix=dict(img="val/"))
    found = export.find_images(Config(dict(test_dataloader=dict(dataset=dataset))), tmp_path)
    assert [path.name for path in found] == ["a.png", "b.jpg", "c.jpg"]
    generated = export.find_images(Config(dict()), tmp_path)
    assert len(generated) == 3 and all(path.is_file() for path in generated)


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    network = export.Network(detector(tmp_path))
    cfg = Config.fromfile(tmp_path / "config.py")
    with pytest.raises(ConfigError, match=r"cannot read the image .*broken.jpg"):
        list(export.load_images(cfg, network, [tmp_path / "broken.jpg"]))
