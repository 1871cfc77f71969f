"""The ways in which a tensor's values lie in memory, as callers have them."""

from collections.abc import Callable

import torch
from torch import Tensor


def _surrounded(tensor: Tensor, step: int, before: int) -> Tensor:
    """Every `step`-th element of each dimension of a larger tensor; NaN is everywhere else."""
    larger = tensor.new_full([before + step * n for n in tensor.shape], float("nan"))
    view = larger[tuple(slice(before, None, step) for _ in tensor.shape)]
    return view.copy_(tensor)


def _at_odd_offset(tensor: Tensor) -> Tensor:
    """One element behind the start of its storage, where no vector is aligned."""
    storage = tensor.new_full([tensor.numel() + 2], float("nan"))
    return storage[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


def _channels_last_narrow(tensor: Tensor) -> Tensor:
    """Channels last among more channels, as a part of a wider map."""
    if tensor.dim() < 3:
        return tensor
    return _surrounded(tensor.movedim(1, -1), 1, 1).movedim(-1, 1)


def _reversed(tensor: Tensor) -> Tensor:
    """The dimensions in the opposite order in memory."""
    order = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def _flipped(tensor: Tensor) -> Tensor:
    """Transposed in its last two dimensions, as an image that is mirrored at its diagonal."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor


def _negated(tensor: Tensor) -> Tensor:
    """A view whose numbers have the opposite sign in memory, as of a conjugate's imaginary part."""
    return torch._neg_view(-tensor)


def _expanded(dimension: int) -> Callable[[Tensor], Tensor]:
    """The first values along the dimension in place of all others, at a stride of zero."""

    def expanded(tensor: Tensor) -> Tensor:
        d = min(dimension, tensor.dim() - 1)
        return tensor.narrow(d, 0, min(1, tensor.shape[d])).expand(tensor.shape)

    return expanded


#: By name; all but `expanded…` keep the values.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "channels last": _channels_last,
    "reversed": _reversed,
    "at an odd offset": _at_odd_offset,
    "narrow": lambda tensor: _surrounded(tensor, 1, 1),
    "every second": lambda tensor: _surrounded(tensor, 2, 0),
    "channels last, narrow": _channels_last_narrow,
    "flipped": _flipped,
    "negated": _negated,
    "expanded batch": _expanded(0),
    "expanded channels": _expanded(1),
    "expanded rows": _expanded(2),
    "expanded columns": _expanded(3),
}
