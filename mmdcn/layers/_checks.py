"""Checks of the arguments that layers are built with."""

import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple

from mmdcn.ops._registration import autocast_is_enabled

# What arguments are called in the code of the papers' authors, and elsewhere.
_OTHER_NAMES = {
    "group": ("deform_groups",),
    "num_groups": ("deform_groups",),
    "offset_groups": ("deform_groups",),
    "channels": ("in_channels", "out_channels"),
    "pad": ("padding",),
}


class NamedArguments:
    """A mix-in that refuses arguments a layer does not take, by the layer's own name.

    Constructors pass on what they do not know, and Python names the last of them, which is a
    private class's. Classes that others derive check their arguments themselves.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        private = cls.__name__.startswith("_") or "._" in cls.__module__
        if private and "__init__" in vars(cls):
            cls.__init__.__qualname__ = "deformable layer.__init__"

    def __new__(cls, *args: Any, **kwargs: Any) -> "NamedArguments":
        # Copying and unpickling give no arguments.
        if (args or kwargs) and cls.__module__.partition(".")[0] == __package__.partition(".")[0]:
            _check_names(cls, args, kwargs)
        return super().__new__(cls)


def _check_names(cls: type, args: tuple, kwargs: dict[str, Any]) -> None:
    taken, required, positional = _arguments(cls)
    check_names(cls.__name__, kwargs, taken)
    if len(args) > len(positional):
        raise TypeError(
            f"{cls.__name__}: expected at most {len(positional)} arguments without a name "
            f"({', '.join(positional)}), got {len(args)}"
        )
    check_names(cls.__name__, [*positional[: len(args)], *kwargs], taken, required)


def check_names(
    where: str, given: Iterable[str], taken: Sequence[str], required: Sequence[str] = ()
) -> None:
    """Require that all arguments that are given are taken, and all required ones given.

    Raises:
        TypeError: they are not.
    """
    given = list(given)
    unknown = next((name for name in given if name not in taken), None)
    if unknown is not None:
        close = [name for name in _OTHER_NAMES.get(unknown, ()) if name in taken]
        close = close or difflib.get_close_matches(unknown, taken, n=1)
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
        raise TypeError(f"{where}: unknown argument {unknown!r}{hint}; it takes {', '.join(taken)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise TypeError(f"{where}: expected {', '.join(missing)}, got none")


def _arguments(cls: type) -> tuple[list[str], list[str], list[str]]:
    """The names of all arguments, of the required ones and of those that need no name."""
    taken: dict[str, inspect.Parameter] = {}
    positional: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = [*inspect.signature(base.__init__).parameters.values()][1:]
        kinds = {parameter.kind for parameter in own}
        if not positional:
            positional = [p.name for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        for parameter in own:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                taken.setdefault(parameter.name, parameter)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    required = [p.name for p in taken.values() if p.default is p.empty]
    return [*taken], required, positional


def check_int(name: str, value: int) -> None:
    """Require an int of at least 1, or else raise ValueError, as all that follow."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")


def check_channels(in_channels: int, out_channels: int, groups: int, deform_groups: int) -> None:
    """Require numbers of channels that the numbers of groups divide."""
    check_int("in_channels", in_channels)
    check_int("out_channels", out_channels)
    check_int("groups", groups)
    check_int("deform_groups", deform_groups)
    for name, channels, divisor_name, divisor in (
        ("in_channels", in_channels, "groups", groups),
        ("out_channels", out_channels, "groups", groups),
        ("in_channels", in_channels, "deform_groups", deform_groups),
    ):
        if channels % divisor:
            fitting = [n for n in range(1, channels + 1) if channels % n == 0]
            raise ValueError(
                f"{name}: expected a multiple of {divisor_name}={divisor}, got {channels}; "
                f"{divisor_name} can be {', '.join(map(str, fitting))}"
            )


def check_numbers(
    name: str, value: int | tuple[int, ...], minimum: int, rank: int
) -> tuple[int, ...]:
    """The value as one number for each dimension."""
    numbers = _ntuple(rank)(value)
    if len(numbers) != rank or not all(isinstance(v, int) and v >= minimum for v in numbers):
        several = {
            1: "one in a tuple",
            2: "a pair of ints (vertical, horizontal)",
            3: "three ints (depth, vertical, horizontal)",
        }
        raise ValueError(
            f"{name}: expected an int or {several[rank]}, each at least {minimum}, got {value!r}"
        )
    return numbers


def check_pair(name: str, value: int | tuple[int, int], minimum: int) -> tuple[int, int]:
    """The value as a number for the height and one for the width."""
    return check_numbers(name, value, minimum, 2)


def check_input(layer: nn.Module, x: Tensor, rank: int, dtype: torch.dtype | None) -> None:
    """Require a batch that a layer can take: torch's errors tell of the layer's own convolution.

    Args:
        layer: it has `in_channels`.
        x: what it was given.
        rank: the number of spatial dimensions.
        dtype: of the layer's weights, which the input has to have too, but under autocast; None
            where it is not known.

    Raises:
        TypeError: `x` is no tensor of floating point, or of another dtype than the layer.
        ValueError: it has another number of dimensions or channels.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return  # The layer has been called with such an input, or would be told the same by torch.
    name, channels = type(layer).__name__, layer.in_channels
    sizes = ("L",) if rank == 1 else ("D", "H", "W")[-rank:]
    shape = f"(N, {', '.join((str(channels), *sizes))})"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected the input to be a tensor {shape}, got {type(x)}")
    if x.dim() != rank + 2:
        hint = ": add the batch by x[None]" if x.dim() == rank + 1 else ""
        raise ValueError(
            f"{name}: expected an input of shape {shape}, got one of shape {tuple(x.shape)}{hint}"
        )
    if x.shape[1] != channels:
        raise ValueError(
            f"{name}: expected an input of shape {shape}, got {x.shape[1]} channels in the shape "
            f"{tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected an input of floating point, got {x.dtype}: x.float()")
    if dtype not in (None, x.dtype) and not autocast_is_enabled(x.device.type):
        raise TypeError(
            f"{name}: expected an input of {dtype}, as the layer's weights are, got {x.dtype}: "
            f"convert it by x.to({dtype}), or the layer by layer.to({x.dtype})"
        )
