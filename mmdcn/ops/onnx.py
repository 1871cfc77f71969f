"""Translation to ONNX for ``torch.onnx.export(..., dynamo=True)``, which is its default.

Nobody needs to import this: torch's exporter, as soon as it is imported, does
(:mod:`mmdcn.ops._onnx_exporters`).

:func:`mmdcn.ops.deform_conv2d`, and hence every layer, becomes the standard operator ``DeformConv``
(opset 19 and newer). It has no inputs in mixed precision: half-precision features beside float32
coordinates are computed in float32, and the result is rounded as ours is. For opset 18 and older,
the exporter finds no translation and raises its own error, which names the operator.

It needs the packages onnx and onnxscript, as torch's exporter does.
"""

from collections.abc import Sequence

import torch

from . import deform_conv  # noqa: F401  # registers the operator

try:
    import onnxscript
    from onnxscript.onnx_opset import opset19

    # The exporter reads this registry at every export. Its public interface is a translation table,
    # which callers would have to pass to each export.
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl
except ModuleNotFoundError as error:
    raise ImportError(
        f"mmdcn.ops.onnx: torch's ONNX exporter does not load under torch {torch.__version__} "
        f"({error}): `pip install onnx onnxscript`, and torch >= 2.10"
    ) from error


@onnx_impl(torch.ops.mmdcn.deform_conv2d.default, trace_only=True, opset_introduced=19)
def deform_conv2d(
    input: onnxscript.FLOAT,
    offset: onnxscript.FLOAT,
    weight: onnxscript.FLOAT,
    bias: onnxscript.FLOAT | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    mask: onnxscript.FLOAT | None = None,
) -> onnxscript.FLOAT:
    """``mmdcn::deform_conv2d`` as ``DeformConv``, whose offsets have the order of mmdcn's."""
    kernel = list(weight.shape[2:])
    features = (input, weight, bias)
    mixed = input.dtype != offset.dtype
    if mixed:
        features = [t if t is None else opset19.CastLike(t, offset) for t in features]
    output = opset19.DeformConv(
        *features[:2],
        offset,
        features[2],
        mask,
        dilations=dilation,
        group=input.shape[1] // weight.shape[1],
        kernel_shape=kernel,
        offset_group=offset.shape[1] // (2 * kernel[0] * kernel[1]),
        pads=[*padding, *padding],
        strides=stride,
    )
    return opset19.CastLike(output, input) if mixed else output
