"""What mmengine needs in order to count the operations and activations of our operator.

``mmengine.analysis.get_model_complexity_info`` traces a model, and looks each operator up by name.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.analysis.jit_handles import generic_activation_jit, get_shape

from mmdcn.ops.deform_conv import multiply_adds

__all__ = ["install"]

OPERATOR = "mmdcn::deform_conv2d"


def install() -> None:
    """Register the operator with mmengine's analyses."""
    complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS[OPERATOR] = _count_multiply_adds
    complexity_analysis._DEFAULT_SUPPORTED_ACT_OPS[OPERATOR] = generic_activation_jit("deform_conv")


def _count_multiply_adds(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """As mmengine counts a convolution: a multiplication and its addition are one operation."""
    _, _, weight, *_ = inputs
    return Counter({"deform_conv": multiply_adds(get_shape(weight), get_shape(outputs[0]))})
