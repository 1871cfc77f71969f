"""Checks of arguments, with which every operator's public function begins.

They raise TypeError or ValueError that names the argument, what was expected and what came.
"""

import operator
import sys

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)
LARGEST_NUMBER = 2**31 - 1  # of what a convolution's geometry is given by
_LARGEST_FLOAT = sys.float_info.max
LONGEST_SIDE = 2**30  # because the kernels count rows and columns in 32 bits


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    """The names of the dtypes as words: "float32 or float64", for example."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def listed(words: tuple[str, ...]) -> str:
    """The words as a list: "height and width", for example."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def coordinate_dtype(features: torch.dtype) -> torch.dtype:
    """The dtype in which the kernels take coordinates beside features of the given one."""
    return torch.float64 if features == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------ tensors


def check_tensors(
    dimensions: dict[str, int], optional: tuple[str, ...] = (), **arguments: Tensor | None
) -> None:
    """Check that each is a dense tensor of its number of dimensions, or None if `optional`."""
    for name, argument in arguments.items():
        if argument is None and name in optional:
            continue
        if not isinstance(argument, Tensor):
            expected = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(argument).__name__}")
        if argument.layout is not torch.strided or argument.is_nested:
            kind = "a nested tensor" if argument.is_nested else f"layout {argument.layout}"
            raise TypeError(f"{name}: expected a dense tensor, of layout torch.strided, got {kind}")
        expected = dimensions[name]
        if argument.dim() != expected:
            plural = "" if expected == 1 else "s"
            raise ValueError(
                f"{name}: expected {expected} dimension{plural}, got shape {tuple(argument.shape)}"
            )


def check_types(
    input: Tensor, features: dict[str, Tensor | None], coordinates: dict[str, Tensor | None]
) -> None:
    """Check that the kernels take the input's dtype, and that the other dtypes go with it.

    Features have the dtype of the input, and so have coordinates, which may be float32 as well
    beside half-precision features. All tensors are on one device.
    """
    if input.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"input: expected dtype {names(FEATURE_DTYPES)}, got {names((input.dtype,))}"
        )
    own = (input.dtype,)
    wide = (input.dtype, torch.float32) if input.dtype in HALF_DTYPES else own
    expected = [(own, features), (wide, coordinates)]
    for dtypes, tensors in expected:
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if tensor.dtype not in dtypes:
                raise TypeError(
                    f"{name}: expected dtype {names(dtypes)} beside input of {names(own)}, "
                    f"got {names((tensor.dtype,))}"
                )
            if tensor.device != input.device:
                raise ValueError(
                    f"{name}: expected device {input.device} as input has, got {tensor.device}"
                )


def check_sides(input: Tensor, size: tuple[int, ...], sides: tuple[str, ...]) -> None:
    """Check that the sides of the input are short enough for the kernels to count."""
    if any(length >= LONGEST_SIDE for length in size):
        raise ValueError(
            f"input: expected a {' and a '.join(sides)} below 2**30, got {tuple(size)}"
        )


def check_channels(input: Tensor, channels: int) -> None:
    """Check that the input has at least one channel."""
    if channels < 1:
        raise ValueError(f"input: expected at least one channel, got shape {tuple(input.shape)}")


def output_size(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    sides: tuple[str, ...],
) -> tuple[int, ...]:
    """The size of a convolution's output, which the kernels must be able to count."""
    out_size = tuple(
        (length + 2 * pad - dil * (taps - 1) - 1) // step + 1
        for length, pad, dil, taps, step in zip(size, padding, dilation, kernel, stride)
    )
    if any(length >= LONGEST_SIDE for length in out_size):
        raise ValueError(
            f"padding: expected an output with a {' and a '.join(sides)} below 2**30, got "
            f"{out_size} with padding {padding}"
        )
    if any(length < 1 for length in out_size):
        raise ValueError(
            f"input: expected {listed(sides)} of at least the dilated kernel's, "
            f"{tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel))}, with "
            f"padding {padding} on each side, got {tuple(size)}"
        )
    return out_size


# ------------------------------------------------------------------------------------------ numbers


def number(name: str, value: float) -> float:
    """The value, a float where it was an int, after a check that it is a finite number."""
    numbers = (int, float, torch.SymInt, torch.SymFloat)
    if not isinstance(value, numbers) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT:
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value) if type(value) is int else value


def as_int(value: int) -> int:
    """The value as an int where it stands for one, as those of numpy do; unchanged otherwise."""
    if isinstance(value, (int, torch.SymInt)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def is_whole(value: int) -> bool:
    """Whether the value is an int; True and False do not count as ints here."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def flag(name: str, value: bool) -> bool:
    """The value as a bool, after a check that it is True, False, 1 or 0."""
    if not isinstance(value, (bool, int)) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def numbers(name: str, value: int | tuple[int, ...], rank: int, at_least: int) -> tuple[int, ...]:
    """The value as one number for each dimension."""
    if type(value) is int and at_least <= value <= LARGEST_NUMBER:
        return (value,) * rank
    each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    each = tuple(map(as_int, each))
    if not all(map(is_whole, each)):
        several = {1: "a tuple of one int", 2: "a pair of ints", 3: "three ints"}[rank]
        raise TypeError(f"{name}: expected an int or {several}, got {value!r}")
    too_large = any(n > LARGEST_NUMBER for n in each)
    if len(each) != rank or too_large or any(n < at_least for n in each):
        count = {1: "one number", 2: "one or two numbers", 3: "one or three numbers"}[rank]
        below = " and below 2**31" if too_large else ""
        raise ValueError(f"{name}: expected {count} of at least {at_least}{below}, got {value!r}")
    return each


def pair(name: str, value: int | tuple[int, int], at_least: int) -> tuple[int, int]:
    """The value as a number for the height and one for the width."""
    return numbers(name, value, 2, at_least)
