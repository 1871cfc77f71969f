"""What goes into float16 in a file, and what stays in float32."""

import json

import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")

import onnx
from torch import Tensor, nn

from mmdcn import machine
from mmdcn.deploy.comparison import HALF, LargestError
from mmdcn.engine import export
from mmdcn.ops import deform_conv2d

pytestmark = pytest.mark.skipif(
    bool(machine.onnxruntime_problem()), reason="onnxruntime is too old"
)

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Small(nn.Module):
    """A network of each kind of layer, and some decoding."""

    input_names, output_names, metadata = ("images",), ["shifted", "scores"], {}

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.offset = nn.Conv2d(8, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.Conv2d(8, 4, 1)

    @property
    def detector(self) -> nn.Module:
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(images).relu()
        offset, mask = self.offset(x).split([18, 9], dim=1)
        x = x + deform_conv2d(x, offset, self.weight, padding=1, mask=mask.sigmoid())
        y = nn.functional.max_pool2d(self.norm(x), 2).relu()
        outputs = self.last(nn.functional.interpolate(y, scale_factor=2.0))
        return outputs.exp() + 2000, outputs

    def twice(self, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.cat([inputs[0]] * 2),)

    def comparison(self, tolerance) -> LargestError:
        return LargestError(tolerance=tolerance)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The file, and what was compared."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    given = (torch.randn(1, 3, 24, 32),)
    verified = export.export(Small().eval(), [given], path, seconds=0.01, half=True)
    return onnx.load(path), verified


def test_layers_are_in_float16_and_coordinates_are_not(written):
    model, _ = written
    onnx.checker.check_model(model, full_check=True)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    def kinds(operator: str) -> list[int]:
        """The type of the first input of each node of an operator."""
        return [types[node.input[0]] for node in graph.node if node.op_type == operator]

    # That of the offsets stays.
    assert sorted(kinds("Conv")) == [FLOAT, FLOAT16, FLOAT16]
    assert set(kinds("Relu") + kinds("MaxPool") + kinds("Resize")) == {FLOAT16}
    assert set(kinds("DeformConv") + kinds("Exp") + kinds("Sigmoid")) == {FLOAT}
    # No weight is there twice.
    sizes = [tuple(tensor.dims) for tensor in graph.initializer if len(tensor.dims) == 4]
    assert sorted(sizes) == [(4, 8, 1, 1), (8, 3, 3, 3), (8, 8, 3, 3), (27, 8, 3, 3)]


def test_inputs_and_outputs_are_as_without_it(written):
    model, _ = written
    values = (*model.graph.input, *model.graph.output)
    assert [value.name for value in values] == ["images", "shifted", "scores"]
    assert {value.type.tensor_type.elem_type for value in values} == {FLOAT}
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about == {"mmdcn.precision": "float16"}


def test_it_computes_nearly_the_same(written):
    _, verified = written
    assert verified.comparison.tolerance == HALF
    assert 1e-5 < verified.comparison.largest_error < 1e-2
