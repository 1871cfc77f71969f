"""Observers of the deformable operators: they are told what every call samples.

The functions in mmdcn.ops tell them of each call, whatever the call comes from (a layer, a head
that computes its own offsets, mmcv's functions) and whatever computes it. A compiled graph calls no
functions, hence tells nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampledCall:
    """What one call of a deformable operator samples, in one form for all operators.

    Attributes:
        locations: shape (N, G, K, rank, *out): for each offset group, tap and output position the
            coordinates of the sample, in pixels of the input, in the order of its dimensions.
        regular: shape (K, rank, *out), the same without offsets.
        modulation: shape (N, G, K, *out), or None where the call has none.
        size: the lengths of the input's dimensions.
        weighs: whether the modulation is the sample's weight in a sum, as in DCNv3 and DCNv4;
            otherwise a modulation of 1 leaves the sample as it is.
    """

    locations: Tensor
    regular: Tensor
    modulation: Tensor | None
    size: tuple[int, ...]
    weighs: bool


#: Each is given a function that computes the call, as that takes time and memory.
Observer = Callable[[Callable[[], SampledCall]], None]

OBSERVERS: list[Observer] = []


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tell `observer` of every call in this process while the context lasts."""
    OBSERVERS.append(observer)
    try:
        yield
    finally:
        OBSERVERS.remove(observer)


def tell(describe: Callable[..., SampledCall], *arguments: Any) -> None:
    """Tell the observers of a call that `describe` describes by these arguments."""

    @torch.no_grad()
    def described() -> SampledCall:
        return describe(*arguments)

    for observer in list(OBSERVERS):
        observer(described)


def convolution(
    offset: Tensor,
    mask: Tensor | None,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> SampledCall:
    """A deformable convolution: p = p0 + pn + Δpn, equation (2) of :mod:`mmdcn.ops.reference`.

    `offset` and `mask` are the operator's; the other arguments have a number for each dimension.
    """
    starts = [-p for p in padding]
    p0 = _grid(offset, offset.shape[2:], stride, starts)  # (rank, *out)
    pn = _grid(offset, kernel, dilation, [0] * len(kernel)).flatten(1).T  # (K, rank)
    regular = p0 + pn.reshape(*pn.shape, *[1] * len(size))
    delta = offset.detach().to(regular.dtype).unflatten(1, (-1, *pn.shape))
    modulation = None if mask is None else mask.detach().unflatten(1, (-1, len(pn)))
    return SampledCall(regular + delta, regular, modulation, tuple(size), weighs=False)


def aggregation(
    offset: Tensor,
    mask: Tensor,
    size: Sequence[int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    offset_scale: float,
    remove_center: bool,
) -> SampledCall:
    """A call of DCNv3 or DCNv4: p = p0 + s · (p_k + Δp_k), where p0 is the kernel's middle.

    Arguments are those of :func:`mmdcn.ops.reference.deform_aggregate`: taps go column by column,
    and x comes before y.
    """
    middle = [d * (k - 1) // 2 for d, k in zip(dilation, kernel)]
    starts = [m - p for m, p in zip(middle, padding)]
    p0 = _grid(offset, offset.shape[1:3], stride, starts)
    p_k = _grid(offset, kernel, dilation, [-m for m in middle]).transpose(1, 2).flatten(1).T
    if remove_center:
        center = len(p_k) // 2
        p_k = torch.cat([p_k[:center], p_k[center + 1 :]])
    regular = p0 + offset_scale * p_k[..., None, None]
    delta = offset.detach().to(regular.dtype).unflatten(-1, (-1, 2)).flip(-1)
    delta = delta.permute(0, 3, 4, 5, 1, 2)  # (N, G, K, 2, Ho, Wo)
    modulation = mask.detach().permute(0, 3, 4, 1, 2)
    return SampledCall(
        regular + offset_scale * delta, regular, modulation, tuple(size), weighs=True
    )


def _grid(
    like: Tensor, lengths: Sequence[int], steps: Sequence[int], starts: Sequence[int]
) -> Tensor:
    """Coordinates of a grid in row-major order, of shape (rank, *lengths)."""
    # Half precision has no fractions left at the far side of an image.
    dtype = torch.promote_types(like.dtype, torch.float32)
    axes = [
        torch.arange(length, dtype=dtype, device=like.device) * step + start
        for length, step, start in zip(lengths, steps, starts)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))
