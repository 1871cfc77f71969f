"""Translation to ONNX for ``torch.onnx.export(..., dynamo=True)``, which is its default.

Nobody needs to import this: torch's exporter, as soon as it is imported, does
(:mod:`mmdcn.ops._onnx_exporters`).

:func:`mmdcn.ops.deform_conv2d`, and hence every layer of v1 and v2, becomes the standard operator
``DeformConv`` (opset 19 and newer), and so do :func:`mmdcn.ops.dcnv3` and :func:`mmdcn.ops.dcnv4`.
It has no inputs in mixed precision: half-precision features beside float32 coordinates are computed
in float32, and the result is rounded as ours is. :func:`mmdcn.ops.deform_roi_pool` becomes
``RoiAlign``, unless position-sensitive. :func:`mmdcn.ops.deform_conv3d` has no counterpart. For
opset 18 and older, the exporter finds no translation and raises its own error, which names the
operator.

It needs the packages onnx and onnxscript, as torch's exporter does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import (  # noqa: F401  # registers the operators
    _onnx_graphs,
    deform_aggregate,
    deform_conv,
    deform_conv_nd,
    deform_roi_pool,
)

try:
    import onnxscript
    from onnxscript import ir
    from onnxscript.onnx_opset import opset19

    # The exporter reads this registry at every export. Its public interface is a translation table,
    # which callers would have to pass to each export.
    from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl
except ModuleNotFoundError as error:
    raise ImportError(
        f"mmdcn.ops.onnx: torch's ONNX exporter does not load under torch {torch.__version__} "
        f"({error}): `pip install onnx onnxscript`, and torch >= 2.10"
    ) from error


class _Graph:
    """The graph that the exporter is building, as :mod:`~._onnx_graphs` takes it."""

    def op(self, name: str, *inputs: Any, **attributes: Any) -> Any:
        return getattr(opset19, name)(*inputs, **attributes)

    def constant(self, values: torch.Tensor) -> Any:
        return opset19.Constant(value=ir.tensor(values.numpy()))

    def size(self, value: Any, dimension: int, name: str) -> int:
        return value.shape[dimension]

    def dtype(self, value: Any) -> Any:
        return value.dtype


def _translates(operator: torch._ops.OpOverload) -> Any:
    return onnx_impl(operator, trace_only=True, opset_introduced=_onnx_graphs.OPSET)


def _convolution(build: Callable[..., Any]) -> Callable[..., Any]:
    """The translation of a convolution's operator, all of which have the same arguments."""

    def as_onnx(
        input: onnxscript.FLOAT,
        offset: onnxscript.FLOAT,
        weight: onnxscript.FLOAT,
        bias: onnxscript.FLOAT | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        mask: onnxscript.FLOAT | None = None,
    ) -> onnxscript.FLOAT:
        return build(_Graph(), input, offset, weight, bias, stride, padding, dilation, mask)

    return as_onnx


_translates(torch.ops.mmdcn.deform_conv2d.default)(_convolution(_onnx_graphs.deform_conv2d))
_translates(torch.ops.mmdcn.deform_conv_nd.default)(_convolution(_onnx_graphs.deform_conv_nd))


@_translates(torch.ops.mmdcn.deform_aggregate.default)
def deform_aggregate_as_onnx(
    input: onnxscript.FLOAT,
    offset: onnxscript.FLOAT,
    mask: onnxscript.FLOAT,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> onnxscript.FLOAT:
    geometry = (kernel_size, stride, padding, dilation, offset_scale, remove_center)
    return _onnx_graphs.deform_aggregate(_Graph(), input, offset, mask, *geometry)


@_translates(torch.ops.mmdcn.deform_roi_pool.default)
def deform_roi_pool_as_onnx(
    input: onnxscript.FLOAT,
    rois: onnxscript.FLOAT,
    offset: onnxscript.FLOAT | None,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    position_sensitive: bool,
) -> onnxscript.FLOAT:
    numbers = (output_size, spatial_scale, sampling_ratio, gamma, position_sensitive)
    return _onnx_graphs.deform_roi_pool(_Graph(), input, rois, offset, *numbers)
