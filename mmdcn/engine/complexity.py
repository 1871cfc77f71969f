"""Counting of our operators' multiply-adds and activations by mmengine.

``mmengine.analysis.get_model_complexity_info`` traces a model, and looks each operator up by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from mmdcn.ops._registration import OPERATORS, Operator

__all__ = ["install"]


def install() -> None:
    """Register every operator with mmengine's analyses."""
    for operator in OPERATORS.values():
        name = f"mmdcn::{operator.name}"
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[name] = _multiply_adds_of(operator)
        complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[name] = generic_activation_jit(
            _group(operator)
        )


def _group(operator: Operator) -> str:
    """The name under which mmengine's tables list it: images' convolutions without a rank."""
    return operator.name.removesuffix("2d")


def _multiply_adds_of(operator: Operator) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """A count like mmengine's of a convolution: a multiply and its addition are one operation."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        named = dict(zip(operator.arguments, map(_shape_or_value, inputs)))
        multiply_adds = operator.multiply_adds(**named, output=get_shape(outputs[0]))
        return Counter({_group(operator): multiply_adds})

    return count


def _shape_or_value(value: Any) -> Any:
    """The shape of a tensor in a trace; the value of anything else, as far as it is constant."""
    return get_shape(value) if value.isCompleteTensor() else value.toIValue()
