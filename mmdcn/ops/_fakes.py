"""The fake kernels of the operators: shapes, dtypes and layouts of what they return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checks import check_types, coordinate_dtype

if TYPE_CHECKING:
    from ._registration import Operator


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout that an operator's result takes over from this tensor, as tensors.h defines it."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _check(operator: Operator, named: dict[str, Any]) -> None:
    """Refuse arguments of the compiled operator that do not fit together, as its kernels do."""
    input = named["input"]
    tensors = {n: t for n, t in named.items() if isinstance(t, Tensor) and n != "input"}
    features = {n: t for n, t in tensors.items() if n in ("weight", "bias", "grad_output")}
    coordinates = {n: t for n, t in tensors.items() if n not in features}
    check_types(input, features, coordinates)
    for name, tensor in coordinates.items():
        wide = coordinate_dtype(input.dtype)
        if tensor.dtype != wide:
            raise TypeError(f"{name}: expected dtype {wide}, got {tensor.dtype}")
    operator.check(**{name: named.get(name) for name in operator.arguments})


def register_fakes(operator: Operator) -> None:
    """Kernels for tensors without values.

    They are called, too, where some tensor is on the meta device and others are not.
    """

    def forward(*arguments, **_):
        named = dict(zip(operator.arguments, arguments))
        _check(operator, named)
        return operator.output(**named)

    def backward(*arguments, **_):
        named = dict(zip(operator.backward_arguments, arguments))
        _check(operator, named)
        expected = operator.output(**named).shape
        if named["grad_output"].shape != expected:
            raise ValueError(
                f"grad_output: expected shape {tuple(expected)}, the output's, got "
                f"{tuple(named['grad_output'].shape)}"
            )

        def gradient(name: str, wanted: bool) -> Tensor:
            tensor = named[name]
            if tensor is None:
                input = named["input"]
                return input.new_empty(0, dtype=coordinate_dtype(input.dtype))
            if not wanted:
                return tensor.new_empty(0)
            layout = memory_format(tensor) if name in operator.layouts else torch.contiguous_format
            return torch.empty(
                tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout
            )

        return tuple(map(gradient, operator.gradients, named["output_mask"]))

    torch.library.register_fake(f"mmdcn::{operator.name}", forward)
    torch.library.register_fake(f"mmdcn::{operator.name}_backward", backward)
