"""Deformable convolutions in OpenVINO, and files that it cannot read."""

import importlib
import sys

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

from torch import nn

from mmdcn.deploy import openvino as ours
from mmdcn.engine.preflight import ConfigError
from mmdcn.ops import dcnv3, deform_conv2d, deform_roi_pool


class Convolutions(nn.Module):
    """Deformable convolutions with and without bias and modulation, and in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.grouped = nn.Parameter(torch.randn(6, 2, 3, 5))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x, offset, mask, wide, wide_mask):
        geometry = dict(stride=(2, 1), padding=(2, 1), dilation=(1, 2))
        return (
            deform_conv2d(x, offset, self.weight, padding=1),
            deform_conv2d(x, offset, self.weight, self.bias, padding=1),
            deform_conv2d(x, offset, self.weight, padding=1, mask=mask),
            deform_conv2d(x, wide, self.grouped, self.bias, mask=wide_mask, **geometry),
        )


def test_deformable_convolutions(tmp_path):
    # Offsets that leave the image too.
    given = (
        torch.randn(2, 4, 9, 10),
        torch.randn(2, 18, 9, 10) * 4,
        torch.rand(2, 9, 9, 10),
        torch.randn(2, 60, 6, 4) * 4,
        torch.rand(2, 30, 6, 4),
    )
    module, path = Convolutions(), tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(module, given, path, dynamo=True, verbose=False)
        expected = module(*given)
    outputs = ours.compile_model(path)([value.numpy() for value in given]).values()
    for output, value in zip(outputs, expected, strict=True):
        assert torch.allclose(torch.from_numpy(output), value, atol=1e-5)


class Others(nn.Module):
    """Channels that are sampled by themselves, and pooling at moved bins."""

    def forward(self, x, offset, mask, features, rois, moves):
        options = dict(kernel_size=(3, 5), padding=(1, 2), group=2, offset_scale=0.5)
        return (
            dcnv3(x, offset, mask, **options),
            deform_roi_pool(features, rois, moves, output_size=(3, 7), spatial_scale=0.5),
        )


def test_dcnv3_and_roi_pooling(tmp_path):
    start = torch.rand(9, 2) * 15
    rois = torch.cat([torch.arange(9)[:, None] % 2, start, start + 4 + torch.rand(9, 2) * 9], dim=1)
    given = (
        torch.randn(2, 9, 10, 6),
        torch.randn(2, 9, 10, 60) * 2,
        torch.rand(2, 9, 10, 30),
        torch.randn(2, 4, 16, 18),
        rois,
        torch.randn(9, 4, 3, 7),
    )
    path = tmp_path / "model.onnx"
    torch.onnx.export(Others(), given, path, dynamo=True, verbose=False)
    outputs = ours.compile_model(path)([value.numpy() for value in given]).values()
    for output, value in zip(outputs, Others()(*given), strict=True):
        assert torch.allclose(torch.from_numpy(output), value, atol=1e-4)


def test_what_cannot_be_read_or_written(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("no model")
    with pytest.raises(ConfigError, match=r"OpenVINO cannot read .*model\.onnx: "):
        ours.read(path)
    with pytest.raises(ConfigError, match=r"expected a name ending in \.xml, got .*model\.ir"):
        ours.save(path, tmp_path / "model.ir")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_that_is_too_old(monkeypatch):
    """Before 2025.0 its operators are elsewhere."""
    monkeypatch.delattr("openvino.opset8")
    monkeypatch.setitem(sys.modules, "openvino.opset8", None)
    with pytest.raises(ConfigError, match=r"needs openvino 2025\.0 or newer.*'openvino>=2025\.0'"):
        importlib.reload(ours)
