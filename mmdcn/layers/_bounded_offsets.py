"""Offsets with a bound, which they approach smoothly: the argument ``max_offset`` of layers."""

import math

import torch
from torch import Tensor


def check_max_offset(max_offset: float | None) -> None:
    """Require a number above 0, or None."""
    if max_offset is None:
        return
    number = isinstance(max_offset, int | float) and not isinstance(max_offset, bool)
    if not number or not 0 < max_offset < math.inf:
        raise ValueError(
            f"max_offset: expected None or a number of pixels above 0, got {max_offset!r}"
        )


def bounded(offset: Tensor, max_offset: float | None) -> Tensor:
    """The offset within ±max_offset, small offsets nearly as they are; None leaves all of them.

    The arc tangent has a gradient that falls with the square of the offset only. That of tanh is
    zero in float32 from nine times the bound on, and what has gone so far would stay there.
    """
    if max_offset is None:
        return offset
    scale = 2 * max_offset / math.pi
    return scale * torch.atan(offset / scale)
