"""Translation to ONNX for ``torch.onnx.export(..., dynamo=False)``, which works on a traced graph.

That exporter is deprecated, and many programs call it. Its graph has what a trace has seen: types,
and sizes, which ``dynamic_axes`` open afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.onnx
from torch.onnx import symbolic_helper

from . import _onnx_graphs

if TYPE_CHECKING:
    from torch._C import Value
    from torch.onnx._internal.torchscript_exporter.jit_utils import GraphContext


class _Graph:
    """The graph that the exporter is building, as :mod:`~._onnx_graphs` takes it."""

    def __init__(self, context: GraphContext, operator: str) -> None:
        self.context = context
        self.operator = operator

    def op(self, name: str, *inputs: Value | None, **attributes: Any) -> Value:
        absent = symbolic_helper._optional_input_placeholder_tensor(self.context)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = (absent if value is None else value for value in inputs)
        typed = {f"{key}_{_kind(value)}": value for key, value in attributes.items()}
        return self.context.op(name, *given, **typed)

    def constant(self, values: torch.Tensor) -> Value:
        return self.context.op("Constant", value_t=values)

    def size(self, value: Value, dimension: int, name: str) -> int:
        size = symbolic_helper._get_tensor_dim_size(value, dimension)
        if size is None:
            raise torch.onnx.errors.SymbolicValueError(
                f"mmdcn::{self.operator}: the size of dimension {dimension} of the {name} is not "
                "in the graph: export a traced model, or use dynamo=True",
                value,
            )
        return size

    def dtype(self, value: Value) -> Any:
        return value.type().scalarType()


def _kind(value: Any) -> str:
    """How an attribute's name ends in that exporter: by its type, or that of its elements."""
    first = value[0] if isinstance(value, list) else value
    return {int: "i", float: "f", str: "s"}[type(first)]


# What each argument is, in the exporter's letters: v for values, i for a whole number, is for
# several, f and b; where the call ends with how it is computed, which the graph does not say.
_ARGUMENTS = {
    "deform_conv2d": ("v", "v", "v", "v", "is", "is", "is", "v"),
    "deform_conv_nd": ("v", "v", "v", "v", "is", "is", "is", "v"),
    "deform_aggregate": ("v", "v", "v", "is", "is", "is", "is", "f", "b"),
    "deform_roi_pool": ("v", "v", "v", "is", "f", "i", "f", "b"),
}


def _symbolic(name: str, kinds: tuple[str, ...]) -> Callable[..., Value]:
    build = getattr(_onnx_graphs, name)

    def translate(context: GraphContext, *given: Value) -> Value:
        arguments = [symbolic_helper._parse_arg(value, kind) for value, kind in zip(given, kinds)]
        values = [
            None if kind == "v" and symbolic_helper._is_none(value) else value
            for value, kind in zip(arguments, kinds)
        ]
        return build(_Graph(context, name), *values)

    return translate


def register() -> None:
    """Tell torch's exporter."""
    for name, kinds in _ARGUMENTS.items():
        torch.onnx.register_custom_op_symbolic(
            f"mmdcn::{name}", _symbolic(name, kinds), _onnx_graphs.OPSET
        )
