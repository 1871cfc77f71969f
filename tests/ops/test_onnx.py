"""The translations to ONNX, computed by onnxruntime, against the operator.

``import mmdcn`` is all that they need: nothing here imports :mod:`mmdcn.ops.onnx`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmdcn.machine import ONNXRUNTIME_WITH_DEFORM_CONV

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime", minversion=ONNXRUNTIME_WITH_DEFORM_CONV)

import onnx
import onnxruntime

from mmdcn.layers import DeformConv1dPack, ModulatedDeformConv1dPack
from mmdcn.ops import dcnv3, dcnv4, deform_conv1d, deform_conv2d, deform_conv3d, deform_roi_pool
from tests.ops.problems import Problem
from tests.programs import run_python
from tests.pytorch.models import PACKS, backbone, scatter_samples

DYNAMIC = torch.export.Dim.DYNAMIC
PROBLEMS = {
    "v1": Problem(has_mask=False, has_bias=False),
    "v1 with bias": Problem(has_mask=False),
    "v2": Problem(has_bias=False),
    "v2 with bias": Problem(),
    "groups": Problem(2, 12, (7, 8), 6, groups=3, deform_groups=4),
    "an offset group per channel": Problem(1, 4, (7, 8), 4, groups=2, deform_groups=4),
    "nothing square": Problem(
        2, 6, (9, 14), 4, (2, 5), (2, 1), (1, 3), (3, 2), groups=2, deform_groups=3, spread=3.0
    ),
    "pointwise": Problem(1, 4, (5, 6), 4, (1, 1), padding=(0, 0)),
    "far outside": Problem(spread=30.0),
}


class Call(nn.Module):
    """The operator, with everything but input, offset and mask as constants."""

    def __init__(self, problem: Problem, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        tensors = {
            name: t if t is None else t.detach() for name, t in problem.tensors(dtype).items()
        }
        self.register_buffer("weight", tensors.pop("weight"))
        self.register_buffer("bias", tensors.pop("bias"))
        self.inputs = tuple(t for t in tensors.values() if t is not None)
        self.geometry = problem.arguments()

    def forward(self, input, offset, mask=None):
        return deform_conv2d(input, offset, self.weight, self.bias, mask=mask, **self.geometry)


def export(model: nn.Module, inputs: tuple, path: Path, dynamo: bool, **options) -> None:
    if not dynamo:
        options = {"opset_version": 19} | options
    torch.onnx.export(model, inputs, path, dynamo=dynamo, verbose=False, **options)


def standard(path) -> onnx.ModelProto:
    """The file's model, all of it in standard operators."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    return model


def compare(path, model: nn.Module, inputs: tuple, tolerance: float = 1e-4) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    with torch.no_grad():
        expected = model(*inputs)
    actual = session.run(None, dict(zip(names, (t.numpy() for t in inputs))))
    expected = (expected,) if isinstance(expected, torch.Tensor) else expected
    assert len(actual) == len(expected)
    for ours, theirs in zip(expected, actual):
        assert ours.shape == theirs.shape
        difference = np.abs(theirs.astype(np.float64) - ours.double().numpy()).max()
        assert difference <= tolerance * max(1.0, float(ours.abs().max()))


BOTH_EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])


@BOTH_EXPORTERS
@pytest.mark.parametrize("case", PROBLEMS)
def test_standard_operator(case, dynamo, tmp_path):
    problem = PROBLEMS[case]
    model, path = Call(problem), tmp_path / "model.onnx"
    export(model, model.inputs, path, dynamo)
    (node,) = (n for n in standard(path).graph.node if n.op_type == "DeformConv")
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {
        "kernel_shape": list(problem.kernel),
        "strides": list(problem.stride),
        "pads": [*problem.padding, *problem.padding],
        "dilations": list(problem.dilation),
        "group": problem.groups,
        "offset_group": problem.deform_groups,
    }
    compare(path, model, model.inputs)


class OfTensors(nn.Module):
    """A function, all of whose arguments but tensors are constants."""

    def __init__(self, function, **arguments) -> None:
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, *tensors):
        return self.function(*tensors, **self.arguments)


def aggregation(groups, kernel, stride, padding, dilation, scale, remove_center, dtype):
    """A call of DCNv3 of two images of 9 × 14 pixels, and its tensors."""
    module = OfTensors(
        dcnv3,
        kernel_size=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        group=groups,
        offset_scale=scale,
        remove_center=remove_center,
    )
    height, width = (
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, pad, dil, k, step in zip((9, 14), padding, dilation, kernel, stride)
    )
    samples = groups * (kernel[0] * kernel[1] - remove_center)
    offset, mask = torch.randn(2, height, width, 2 * samples), torch.rand(2, height, width, samples)
    return module, (torch.randn(2, 9, 14, 12).to(dtype), 2 * offset, mask)


AGGREGATIONS = {
    "3×3": (2, (3, 3), (1, 1), (1, 1), (1, 1), 1.0, False, torch.float32),
    "nothing square": (3, (3, 5), (2, 1), (1, 3), (2, 1), 0.7, True, torch.float32),
    "an even kernel": (4, (2, 3), (1, 2), (0, 1), (1, 2), 2.5, False, torch.float32),
    "half precision": (2, (3, 3), (1, 1), (1, 1), (1, 1), 1.0, True, torch.float16),
}


@BOTH_EXPORTERS
@pytest.mark.parametrize("case", AGGREGATIONS)
def test_dcnv3(case, dynamo, tmp_path):
    model, inputs = aggregation(*AGGREGATIONS[case])
    path = tmp_path / "model.onnx"
    export(model, inputs, path, dynamo)
    assert "DeformConv" in {node.op_type for node in standard(path).graph.node}
    compare(path, model, inputs, 2e-3 if inputs[0].dtype == torch.float16 else 1e-4)


@BOTH_EXPORTERS
def test_dcnv4(dynamo, tmp_path):
    """Whose channels are padded to a multiple of eight."""
    model = OfTensors(dcnv4, kernel_size=3, padding=1, group=2)
    inputs, path = (torch.randn(2, 7, 8, 6), torch.randn(2, 7, 8, 56)), tmp_path / "model.onnx"
    export(model, inputs, path, dynamo)
    standard(path)
    compare(path, model, inputs)


POOLS = {
    "adaptive, without offsets": (None, dict(output_size=7)),
    "adaptive, offset groups": (4, dict(output_size=(3, 7), gamma=0.3)),
    "fixed": (2, dict(output_size=(3, 7), sampling_ratio=2)),
}


def regions(count: int) -> torch.Tensor:
    start = torch.rand(count, 2) * 20
    images = torch.randint(0, 2, (count, 1)).float()
    return torch.cat([images, start, start + 4 + torch.rand(count, 2) * 25], dim=1)


@BOTH_EXPORTERS
@pytest.mark.parametrize("case", POOLS)
def test_roi_pooling(case, dynamo, tmp_path):
    offset_channels, arguments = POOLS[case]
    inputs = [torch.randn(2, 8, 20, 22), regions(20)]
    if offset_channels is not None:
        inputs.append(torch.randn(20, offset_channels, *arguments["output_size"]))
    model, path = OfTensors(_pool, spatial_scale=0.5, **arguments), tmp_path / "model.onnx"
    export(model, tuple(inputs), path, dynamo)
    assert "RoiAlign" in {node.op_type for node in standard(path).graph.node}
    compare(path, model, tuple(inputs))


def _pool(input, rois, offset=None, **arguments):
    return deform_roi_pool(input, rois, offset, **arguments)


def test_a_bin_of_whole_pixels_gets_no_row_of_points_more(tmp_path):
    """Where corners are rounded, which at these places make a bin larger than two pixels."""
    corner = torch.rand(50, 2) * 5
    regions = torch.cat([torch.zeros(50, 1), corner, corner + 14], dim=1)
    inputs = (torch.randn(1, 3, 20, 20), regions, torch.randn(50, 2, 7, 7))
    model, path = OfTensors(_pool, output_size=7), tmp_path / "model.onnx"
    # Only those of which PyTorch has two points to a bin as well.
    exact = (regions[:, 3:] - 0.5 - (regions[:, 1:3] - 0.5) == 14).all(dim=1)
    inputs = (inputs[0], inputs[1][exact], inputs[2][exact])
    assert exact.sum() > 5
    export(model, inputs, path, True)
    compare(path, model, inputs)


@BOTH_EXPORTERS
def test_what_has_no_counterpart_says_why(dynamo, tmp_path):
    volume = (torch.randn(1, 2, 4, 4, 4), torch.randn(1, 81, 4, 4, 4), torch.randn(2, 2, 3, 3, 3))
    pooled = (torch.randn(2, 8, 20, 22), regions(3))
    for model, inputs, expected in (
        (OfTensors(deform_conv3d, padding=1), volume, "over three dimensions has no counterpart"),
        (
            OfTensors(_pool, output_size=2, position_sensitive=True),
            pooled,
            "position-sensitive RoI pooling has no counterpart",
        ),
    ):
        with pytest.raises(Exception, match=expected):
            export(model, inputs, tmp_path / "model.onnx", dynamo)
    assert not list(tmp_path.iterdir())


def test_sequences_are_images_of_height_one(tmp_path):
    class Sequence(nn.Module):
        def forward(self, input, offset, weight, mask):
            return deform_conv1d(input, offset, weight, stride=2, padding=1, mask=mask)

    inputs = (torch.randn(2, 4, 9), torch.randn(2, 6, 5), torch.randn(6, 4, 3), torch.rand(2, 6, 5))
    path = tmp_path / "model.onnx"
    torch.onnx.export(Sequence(), inputs, path, dynamo=True, verbose=False)
    assert "DeformConv" in {node.op_type for node in standard(path).graph.node}
    compare(path, Sequence(), inputs)


@pytest.mark.parametrize(
    ("opset", "dynamo"), [*((opset, True) for opset in range(19, 24)), (19, False), (20, False)]
)
def test_opsets(opset, dynamo, tmp_path):
    model, path = Call(PROBLEMS["nothing square"]), tmp_path / "model.onnx"
    export(model, model.inputs, path, dynamo, opset_version=opset)
    assert [o.version for o in standard(path).opset_import if o.domain == ""] == [opset]
    compare(path, model, model.inputs)


def test_an_older_opset_is_refused_by_name(tmp_path):
    model = Call(PROBLEMS["v1"])
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="deform_conv2d"):
        torch.onnx.export(model, model.inputs, dynamo=True, verbose=False, opset_version=18)
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match=r"deform_conv2d.* 19"):
        export(model, model.inputs, tmp_path / "model.onnx", dynamo=False, opset_version=18)


@BOTH_EXPORTERS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, dynamo, tmp_path):
    model, path = Call(PROBLEMS["v2 with bias"], dtype), tmp_path / "model.onnx"
    export(model, model.inputs, path, dynamo)
    if dtype != torch.bfloat16:  # which numpy does not have
        compare(path, model, model.inputs, 1e-4 if dtype == torch.float64 else 2e-3)
    else:
        standard(path)


def test_an_exported_program(tmp_path):
    model, path = Call(PROBLEMS["groups"]), tmp_path / "model.onnx"
    program = torch.export.export(model, model.inputs)
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    standard(path)
    compare(path, model, model.inputs)


@pytest.mark.parametrize("name", PACKS)
def test_layer_of_open_size(name, tmp_path):
    model = scatter_samples(PACKS[name](8, 12, 3, stride=2, padding=1, deform_groups=2)).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 8, 9, 11),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),
    )
    standard(path)
    for shape in ((2, 8, 9, 11), (1, 8, 30, 20), (3, 8, 5, 64)):
        compare(path, model, (torch.randn(shape),))


def export_by_torchscript(model, example, path, axes, traced):
    """With open dimensions of input and output; as a module, or traced before."""
    export(
        torch.jit.trace(model, example) if traced else model,
        (example,),
        path,
        dynamo=False,
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": axes, "output": axes},
    )


@pytest.mark.parametrize("traced", [False, True], ids=["module", "traced"])
@pytest.mark.parametrize("name", PACKS)
def test_layers_of_open_size_in_a_row_by_torchscript(name, traced, tmp_path):
    """The second layer's sizes are in the graph, though ONNX infers no sizes of the first's."""
    layers = (PACKS[name](8, 12, 3, padding=1), PACKS[name](12, 8, 3, padding=1, groups=2))
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()
    for layer in layers:
        scatter_samples(layer)
    example, path = torch.randn(1, 8, 9, 11), tmp_path / "model.onnx"
    axes = {0: "batch", 2: "height", 3: "width"}
    export_by_torchscript(model, example, path, axes, traced)
    operators = [node.op_type for node in standard(path).graph.node]
    assert operators.count("DeformConv") == 2
    for shape in ((1, 8, 9, 11), (2, 8, 30, 20)):
        compare(path, model, (torch.randn(shape),))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", [DeformConv1dPack, ModulatedDeformConv1dPack])
def test_sequences_of_open_length_by_the_older_exporter(kind, traced, tmp_path):
    model = nn.Sequential(kind(4, 6, 3, padding=1), nn.ReLU(), kind(6, 4, 3, padding=1)).eval()
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.3)
    example, path = torch.randn(2, 4, 20), tmp_path / "model.onnx"
    axes = {0: "batch", 2: "length"}
    export_by_torchscript(model, example, path, axes, traced)
    for shape in ((1, 4, 9), (3, 4, 33)):
        compare(path, model, (torch.randn(shape),))


def test_sizes_that_are_not_in_the_graph_are_asked_for(tmp_path):
    class Scripted(nn.Module):
        def forward(self, input, offset, weight):
            return torch.ops.mmdcn.deform_conv2d(
                input, offset, weight, None, [1, 1], [1, 1], [1, 1], None
            )

    inputs = (torch.randn(1, 2, 5, 5), torch.randn(1, 18, 5, 5), torch.randn(2, 2, 3, 3))
    model = torch.jit.script(Scripted())
    axes = {"x": {1: "channels"}}
    with pytest.raises(torch.onnx.errors.SymbolicValueError, match="dimension 1 of the input"):
        export(
            model,
            inputs,
            tmp_path / "model.onnx",
            dynamo=False,
            input_names=["x", "offset", "weight"],
            dynamic_axes=axes,
        )


IN_A_FRESH_PROCESS = """
import sys
sys.modules.update(dict.fromkeys(("mmcv", "mmengine")))  # whose import takes longer than all else
import torch
import mmdcn
from mmdcn.layers import DeformConv2dPack
assert not {"onnx", "onnxscript", "torch.onnx", "torch._dynamo"} & set(sys.modules)
layer, x = DeformConv2dPack(2, 2, 3).eval(), torch.randn(2, 2, 5, 5)
torch.onnx.export(layer, (x,), "torchscript.onnx", dynamo=False, opset_version=19)
torch.onnx.export(layer, (x,), "dynamo.onnx", dynamo=True, verbose=False)
"""


def test_an_import_of_mmdcn_is_enough(tmp_path):
    run_python("-c", IN_A_FRESH_PROCESS, cwd=tmp_path)
    for name in ("dynamo.onnx", "torchscript.onnx"):
        assert "DeformConv" in {node.op_type for node in standard(tmp_path / name).graph.node}


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("DCN", 2),
        ("DCNv2", 2),
        pytest.param("DCN", 6, marks=pytest.mark.slow),
        pytest.param("DCNv2", 6, marks=pytest.mark.slow),
    ],
)
def test_backbone_of_open_size(name, blocks, tmp_path):
    pytest.importorskip("mmdet")
    model, path = backbone(name, blocks=blocks, training=False), tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, 64, 96),),
        path,
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: DYNAMIC, 2: DYNAMIC, 3: DYNAMIC},),
    )
    operators = [node.op_type for node in standard(path).graph.node]
    assert operators.count("DeformConv") == sum(min(blocks, count) for count in (4, 6, 3))
    for shape in ((2, 3, 64, 96), (1, 3, 97, 70)):
        compare(path, model, (torch.randn(shape),))
