"""Whole detectors as files, in onnxruntime."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

import onnx
from mmengine.registry import DefaultScope
from onnxscript import ir

from mmdcn import machine
from mmdcn.deploy.comparison import HALF, SINGLE, Matches
from mmdcn.deploy.detector import EndToEnd
from mmdcn.deploy.evaluation import File
from mmdcn.deploy.half_precision import to_half
from mmdcn.engine import export
from mmdcn.engine.network import Network

from . import tiny

pytestmark = pytest.mark.skipif(
    bool(machine.onnxruntime_problem()), reason="onnxruntime is too old"
)

# Of one image, smaller than a level's stride, and of several.
BATCHES = (((64, 96), (50, 70)), ((40, 40),), ((70, 37), (33, 80), (71, 80)))


def written(cfg, path, **options):
    """A detector, its file, and what was compared."""
    detector = EndToEnd(tiny.build(cfg), **options)
    batch, sizes = tiny.images((64, 96))
    if detector.with_preprocessing:
        batch = (batch * 50 + 128).clamp(0, 255).byte()
    verified = export.export(detector, [(batch, sizes)], path, seconds=0.01)
    return detector, File(path), verified


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Mask R-CNN with a deformable layer, from images in uint8."""
    folder = tmp_path_factory.mktemp("masks")
    with DefaultScope.overwrite_default_scope("mmdet"):
        cfg = tiny.config("mask-rcnn", "DCNv2")
        return written(cfg, folder / "model.onnx", with_preprocessing=True, classes=["a", "b", "c"])


@pytest.fixture(scope="module")
def one_stage(tmp_path_factory):
    """ATSS, from images as the network takes them."""
    folder = tmp_path_factory.mktemp("one_stage")
    with DefaultScope.overwrite_default_scope("mmdet"):
        return written(tiny.config("atss"), folder / "model.onnx")


def same(detector, file, batch, sizes, tolerance=SINGLE) -> Matches:
    with torch.no_grad():
        expected = detector(batch, sizes)
    outputs = file(batch.numpy(), sizes.numpy())
    matches = Matches(tolerance=tolerance)
    matches.add(list(outputs), expected, [torch.from_numpy(value) for value in outputs.values()])
    matches.check()
    return matches


def test_a_batch_of_any_size(one_stage):
    detector, file, verified = one_stage
    assert verified.comparison.detections > 50
    for sizes in BATCHES:
        assert same(detector, file, *tiny.images(*sizes)).detections > 10 * len(sizes)


def test_masks_and_preprocessing(masks):
    detector, file, _ = masks
    for sizes in BATCHES:
        batch, sizes = tiny.images(*sizes)
        batch = (batch * 50 + 128).clamp(0, 255).byte()
        assert same(detector, file, batch, sizes).detections > 10 * len(sizes)


def test_in_openvino(masks, tmp_path):
    """Whole, as the file and in OpenVINO's own format, which needs nothing of ours."""
    openvino = pytest.importorskip("openvino")
    from mmdcn.deploy import openvino as ours

    detector, file, _ = masks
    path = tmp_path / "folder" / "model.xml"
    ours.save(file.path, path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.bin", "model.xml"]
    translated = File(path)
    assert translated.metadata == file.metadata
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    plain = openvino.Core().compile_model(str(path), "CPU", settings)
    for sizes in BATCHES:
        batch, sizes = tiny.images(*sizes)
        batch = (batch * 50 + 128).clamp(0, 255).byte()
        assert same(detector, translated, batch, sizes).detections > 10 * len(sizes)
        outputs = plain(dict(images=batch.numpy(), image_sizes=sizes.numpy())).values()
        expected = translated(batch.numpy(), sizes.numpy()).values()
        assert all((one == other).all() for one, other in zip(outputs, expected))


def test_in_half_precision(masks, tmp_path):
    detector, file, _ = masks
    path = tmp_path / "half.onnx"
    model = ir.load(file.path)
    to_half(model)
    ir.save(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert path.stat().st_size < 0.8 * Path(file.path).stat().st_size
    for sizes in BATCHES:
        batch, sizes = tiny.images(*sizes)
        batch = (batch * 50 + 128).clamp(0, 255).byte()
        found = same(detector, File(path), batch, sizes, HALF)
        assert found.detections > 10 * len(sizes)


def test_preprocessing_is_the_data_preprocessors(masks):
    detector, *_ = masks
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((50, 70), (64, 33))]
    expected = detector.detector.data_preprocessor(dict(inputs=images), training=False)["inputs"]
    sizes = torch.tensor([image.shape[1:] for image in images])
    # What lies outside an image does not matter.
    batch = torch.where(
        detector.preprocessing.stack(images) == 0, 7, detector.preprocessing.stack(images)
    )
    for place, image in zip(batch, images):
        place[:, : image.shape[1], : image.shape[2]] = image
    assert torch.allclose(detector.preprocessing(batch, sizes), expected, atol=1e-5)


def test_what_the_file_says_of_itself(masks):
    _, file, _ = masks
    model = onnx.load(file.path)
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}
    assert {"DeformConv", "RoiAlign", "NonMaxSuppression", "TopK"} <= {
        node.op_type for node in model.graph.node
    }
    images, sizes = model.graph.input
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [d.dim_param or d.dim_value for d in images.type.tensor_type.shape.dim]
    assert shape[1] == 3 and all(isinstance(shape[i], str) for i in (0, 2, 3))
    shape = [d.dim_param or d.dim_value for d in sizes.type.tensor_type.shape.dim]
    assert isinstance(shape[0], str) and shape[1] == 2
    ends = [[d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in model.graph.output]
    assert ends == [[40, 4], [40], [40], [40, 28, 28]]
    assert file.metadata["classes"] == ["a", "b", "c"]
    assert file.metadata["with_preprocessing"] is True
    assert file.metadata["mask_thr_binary"] == 0.5
    assert file.metadata["preprocessing"]["pad_size_divisor"] == 32
    assert file.metadata["preprocessing"]["swap_channels"] is True
    assert json.loads(detector_metadata(model)["mmdcn.max_per_img"]) == 40


def detector_metadata(model) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


@pytest.mark.parametrize(
    ("shape", "dtype", "sizes", "expected"),
    [
        ((1, 4, 64, 64), torch.float32, 1, r"images: expected \(N, 3, H, W\) in float32, .* 4, 64"),
        ((0, 3, 64, 64), torch.float32, 0, r"N at least 1, got \(0, 3, 64, 64\)"),
        ((1, 3, 64, 64), torch.uint8, 1, r"in float32, .* in uint8"),
        ((2, 3, 64, 64), torch.float32, 1, r"image_sizes: expected .* 2 images, got .*\(1, 2\)"),
    ],
)
def test_images_that_it_does_not_take(one_stage, shape, dtype, sizes, expected):
    _, file, _ = one_stage
    with pytest.raises(ValueError, match=expected):
        file(torch.zeros(shape, dtype=dtype).numpy(), torch.full((sizes, 2), 64).numpy())


# Heads and necks that have deformable convolutions of their own.
DEFORMABLE_HEADS = ("vfnet", "reppoints", "tood", "dyhead")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layer"),
    [
        *((name, layer) for name in tiny.CONFIGS for layer in (None, "DCN", "DCNv2")),
        ("retinanet", "DCNv3"),
        ("retinanet", "DCNv4"),
    ],
)
def test_every_detector_with_every_layer(tmp_path, plugin_in_mmdet, name, layer):
    cfg = tiny.config(name, layer)
    detector, file, _ = written(cfg, tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(file.path).graph.node]
    assert ("DeformConv" in operators) == (layer is not None or name in DEFORMABLE_HEADS)
    for sizes in BATCHES:
        assert same(detector, file, *tiny.images(*sizes)).detections > 10 * len(sizes)


@pytest.mark.slow
def test_deformable_pooling(tmp_path, plugin_in_mmdet):
    """Whose offsets come from layers of its own, at each level."""
    cfg = tiny.config("faster-rcnn", **tiny.DEFORMABLE_POOLING)
    detector, file, _ = written(cfg, tmp_path / "model.onnx")
    for sizes in BATCHES:
        assert same(detector, file, *tiny.images(*sizes)).detections > 10 * len(sizes)


def test_raw_outputs_of_tood_are_its_heads(plugin_in_mmdet):
    detector = tiny.build(tiny.config("tood"))
    network, (batch, _) = Network(detector), tiny.images((64, 96), (50, 70))
    with torch.no_grad():
        expected = detector.bbox_head(detector.extract_feat(batch))
        outputs = network(batch)
    assert network.output_names == [
        f"bbox_head.{name}.{level}" for name in ("cls_scores", "bbox_preds") for level in (0, 1)
    ]
    for output, value in zip(outputs, (*expected[0], *expected[1]), strict=True):
        assert torch.allclose(output, value, atol=1e-5)


@pytest.mark.slow
def test_raw_outputs_of_tood_are_written(tmp_path, plugin_in_mmdet):
    network = Network(tiny.build(tiny.config("tood", "DCNv2")))
    given = [(tiny.images(size)[0],) for size in ((64, 96), (80, 40))]
    verified = export.export(network, given, tmp_path / "model.onnx", seconds=0.01)
    assert 0 < verified.comparison.largest_error < 1e-4


def test_raw_outputs_of_a_cascade_are_refused(plugin_in_mmdet):
    with pytest.raises(export.ExportError, match=r"got CascadeRoIHead, whose .* leave out --raw"):
        Network(tiny.build(tiny.config("cascade-mask-rcnn")))
