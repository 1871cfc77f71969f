"""The FLOP formulas of the operators, for ``torch.utils.flop_counter``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from ._registration import Operator


def register_flops(operator: Operator) -> None:
    """Two operations for each multiplication with its addition, as torch counts them."""
    packet = getattr(torch.ops.mmdcn, operator.name)
    backward_packet = getattr(torch.ops.mmdcn, f"{operator.name}_backward")

    @register_flop_formula(packet)
    def forward(*arguments, out_shape, **_) -> int:
        named = dict(zip(operator.arguments, arguments))
        return 2 * operator.multiply_adds(**named, output=out_shape)

    @register_flop_formula(backward_packet)
    def backward(*arguments, **_) -> int:
        named = dict(zip(operator.backward_arguments, arguments))
        wanted = {n for n, want in zip(operator.gradients, named.pop("output_mask")) if want}
        passes = (operator.own_pass in wanted) + bool(wanted - {operator.own_pass})
        shape = named.pop("grad_output")
        missing = {name: None for name in operator.arguments if name not in named}
        return 2 * passes * operator.multiply_adds(**named, **missing, output=shape)
