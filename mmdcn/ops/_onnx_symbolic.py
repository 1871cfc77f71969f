"""Translation to ONNX for ``torch.onnx.export(..., dynamo=False)``, which works on a traced graph.

That exporter is deprecated, and many programs call it. Its graph has what a trace has seen: types,
and sizes, which ``dynamic_axes`` open afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.onnx
from torch.onnx import symbolic_helper

if TYPE_CHECKING:
    from torch._C import Value
    from torch.onnx._internal.torchscript_exporter.jit_utils import GraphContext

# The first version of ONNX's operators that has DeformConv.
OPSET = 19


@symbolic_helper.parse_args("v", "v", "v", "v", "is", "is", "is", "v", "b", "b")
def deform_conv2d(
    g: GraphContext,
    input: Value,
    offset: Value,
    weight: Value,
    bias: Value,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Value,
    *_how_to_compute: bool,
) -> Value:
    """``mmdcn::deform_conv2d`` as ``DeformConv``, as :mod:`mmdcn.ops.onnx` translates it."""
    channels = _size(input, 1, "input")
    offset_channels = _size(offset, 1, "offset")
    group_channels, *kernel = (_size(weight, dimension, "weight") for dimension in (1, 2, 3))
    features = [input, weight, bias]
    mixed = input.type().scalarType() != offset.type().scalarType()
    if mixed:
        features = [t if _is_none(t) else g.op("CastLike", t, offset) for t in features]
    absent = symbolic_helper._optional_input_placeholder_tensor(g)
    output = g.op(
        "DeformConv",
        *features[:2],
        offset,
        *(absent if _is_none(t) else t for t in (features[2], mask)),
        dilations_i=dilation,
        group_i=channels // group_channels,
        kernel_shape_i=kernel,
        offset_group_i=offset_channels // (2 * kernel[0] * kernel[1]),
        pads_i=[*padding, *padding],
        strides_i=stride,
    )
    return g.op("CastLike", output, input) if mixed else output


def _is_none(value: Value) -> bool:
    return symbolic_helper._is_none(value)


def _size(value: Value, dimension: int, name: str) -> int:
    size = symbolic_helper._get_tensor_dim_size(value, dimension)
    if size is None:
        raise torch.onnx.errors.SymbolicValueError(
            f"mmdcn::deform_conv2d: the size of dimension {dimension} of the {name} is not in the "
            "graph: export a traced model, or use dynamo=True",
            value,
        )
    return size


def register() -> None:
    """Tell torch's exporter."""
    torch.onnx.register_custom_op_symbolic("mmdcn::deform_conv2d", deform_conv2d, OPSET)
