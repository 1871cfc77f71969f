"""Checks of arguments that operators have in common."""

import math

import torch
from torch import Tensor

from .deform_conv import FEATURE_DTYPES, _names


def check_types(input: Tensor, **coordinates: Tensor | None) -> None:
    """That there is a kernel for the input, and that what says where to sample it goes with it."""
    if input.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"input: expected dtype {_names(FEATURE_DTYPES)}, got {_names((input.dtype,))}"
        )
    half = input.dtype in (torch.float16, torch.bfloat16)
    dtypes = (input.dtype, torch.float32) if half else (input.dtype,)
    for name, tensor in coordinates.items():
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{name}: expected dtype {_names(dtypes)} beside input of "
                f"{_names((input.dtype,))}, got {_names((tensor.dtype,))}"
            )
        if tensor.device != input.device:
            raise ValueError(
                f"{name}: expected device {input.device} as input has, got {tensor.device}"
            )


def check_number(name: str, value: float) -> None:
    """That it is a finite number."""
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(value, numbers) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def is_whole(value: int) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
