"""Problems for the kernels without torch, and what this machine's library makes of them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@dataclass
class Problem:
    """One call of an operator, forward and backward.

    Args:
        name: what it is.
        operator: its number in run_kernels.cpp.
        dtype: of the features.
        sizes: the shape's integers, in that program's order.
        reals: its real numbers.
        tensors: in its order and its layouts; None for a missing one.
        compute: what this machine's library makes of it, in the program's order and layouts.
    """

    name: str
    operator: int
    dtype: torch.dtype
    sizes: list[int]
    reals: list[float]
    tensors: list[Tensor | None]
    compute: Callable[[], dict[str, Tensor]]

    def packed(self) -> bytes:
        """As the program reads it."""
        head = struct.pack(
            f"<{2 + len(self.sizes)}q", self.operator, NUMBERS[self.dtype], *self.sizes
        )
        head += struct.pack(f"<{len(self.reals)}d", *self.reals)
        bodies = [b"" if t is None else bytes_of(t) for t in self.tensors]
        return head + b"".join(struct.pack("<q", len(body)) + body for body in bodies)

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients, which have elements."""
        return self.compute()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def draw(dtype: torch.dtype) -> list[Problem]:
    """Problems that reach each way in which the kernels compute."""
    random = torch.Generator().manual_seed(0)
    conv2d_kinds = {
        "rows": dict(channels=32, out_channels=40),
        "channels last": dict(channels=32, out_channels=40, channels_last=True),
        "groups": dict(channels=48, out_channels=24, groups=2, deform_groups=2),
        "planes": dict(channels=8, out_channels=16, deform_groups=8),
        "depthwise": dict(channels=24, out_channels=24, groups=24, deform_groups=1),
        "no mask, stride": dict(channels=16, out_channels=8, stride=2, has_mask=False),
    }
    found = [conv2d(random, dtype, name, **kind) for name, kind in conv2d_kinds.items()]
    found += [
        conv_nd(random, dtype, 16, 24, groups=1, deform_groups=2),
        conv_nd(random, dtype, 16, 16, groups=2, deform_groups=1),
        aggregate(random, dtype, 32, groups=2, remove_center=False),
        aggregate(random, dtype, 24, groups=4, remove_center=True),
        roi_pool(random, dtype, 16, position_sensitive=False),
        roi_pool(random, dtype, 8, position_sensitive=True),
    ]
    return found


def _drawn(random: torch.Generator, dtype: torch.dtype, *size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, generator=random, dtype=torch.float64) * scale).to(dtype)


def coordinates(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def conv2d(
    random: torch.Generator,
    dtype: torch.dtype,
    name: str,
    channels: int,
    out_channels: int,
    groups: int = 1,
    deform_groups: int = 1,
    stride: int = 1,
    has_mask: bool = True,
    channels_last: bool = False,
) -> Problem:
    batch, height, width, taps = 2, 9, 13, 9
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    acc = coordinates(dtype)
    x = _drawn(random, dtype, batch, channels, height, width)
    pixels = (out_height, out_width)
    offset = _drawn(random, acc, batch, deform_groups * taps * 2, *pixels, scale=2.0)
    mask = _drawn(random, acc, batch, deform_groups * taps, *pixels).sigmoid()
    mask = mask if has_mask else None
    weight = _drawn(random, dtype, out_channels, channels // groups, 3, 3, scale=0.1)
    bias = _drawn(random, acc, out_channels)
    grad = _drawn(random, dtype, batch, out_channels, *pixels)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))

    def as_given(tensor: Tensor) -> Tensor:
        return tensor.permute(0, 2, 3, 1) if channels_last else tensor

    def compute() -> dict[str, Tensor]:
        steps = ([stride, stride], [1, 1], [1, 1], mask)
        ops = torch.ops.mmdcn
        output = ops.deform_conv2d(x, offset, weight, bias.to(dtype), *steps)
        wanted = [True, True, True, has_mask]
        gradients = ops.deform_conv2d_backward(grad, x, offset, weight, *steps, wanted)
        named = dict(zip(("grad_input", "grad_offset", "grad_weight", "grad_mask"), gradients))
        named["grad_input"] = as_given(named["grad_input"])
        found = {"output": as_given(output), **named}
        return found

    bias = bias.to(dtype).to(acc)  # as the operator takes it
    axis = [stride, 1, 1]
    return Problem(
        f"deform_conv2d, {name}",
        0,
        dtype,
        [batch, channels, height, width, out_channels, *pixels, 3, 3, groups, deform_groups]
        + [*axis, *axis, int(channels_last)],
        [],
        [as_given(x), offset, weight, bias, mask, as_given(grad)],
        compute,
    )


def conv_nd(
    random: torch.Generator,
    dtype: torch.dtype,
    channels: int,
    out_channels: int,
    groups: int,
    deform_groups: int,
) -> Problem:
    batch, size, taps = 2, (4, 5, 6), 27
    acc = coordinates(dtype)
    x = _drawn(random, dtype, batch, channels, *size)
    offset = _drawn(random, acc, batch, deform_groups * taps * 3, *size)
    mask = _drawn(random, acc, batch, deform_groups * taps, *size).sigmoid()
    weight = _drawn(random, dtype, out_channels, channels // groups, 3, 3, 3, scale=0.1)
    bias = _drawn(random, acc, out_channels).to(dtype)
    grad = _drawn(random, dtype, batch, out_channels, *size)

    def compute() -> dict[str, Tensor]:
        steps = ([1] * 3, [1] * 3, [1] * 3, mask)
        output = torch.ops.mmdcn.deform_conv_nd(x, offset, weight, bias, *steps)
        gradients = torch.ops.mmdcn.deform_conv_nd_backward(
            grad, x, offset, weight, *steps, [True] * 4
        )
        named = dict(zip(("grad_input", "grad_offset", "grad_weight", "grad_mask"), gradients))
        # The program gives the sums before they are rounded to 16 bits.
        named["grad_weight"] = named["grad_weight"].to(acc)
        return {"output": output, **named}

    sizes = [batch, channels, out_channels, groups, deform_groups]
    for one in size:
        sizes += [one, one, 3, 1, 1, 1]
    tensors = [x, offset, weight, bias.to(acc), mask, grad]
    return Problem(f"deform_conv_nd, {groups} groups", 1, dtype, sizes, [], tensors, compute)


def aggregate(
    random: torch.Generator, dtype: torch.dtype, channels: int, groups: int, remove_center: bool
) -> Problem:
    batch, height, width, scale = 2, 7, 9, 1.5
    taps = 9 - remove_center
    acc = coordinates(dtype)
    x = _drawn(random, dtype, batch, height, width, channels)
    offset = _drawn(random, acc, batch, height, width, groups, 2 * taps)
    mask = _drawn(random, acc, batch, height, width, groups, taps)
    grad = _drawn(random, dtype, batch, height, width, channels)

    def compute() -> dict[str, Tensor]:
        steps = ([3, 3], [1, 1], [1, 1], [1, 1], scale, remove_center)
        output = torch.ops.mmdcn.deform_aggregate(x, offset, mask, *steps)
        gradients = torch.ops.mmdcn.deform_aggregate_backward(
            grad, x, offset, mask, *steps, [True] * 3
        )
        named = dict(zip(("grad_input", "grad_offset", "grad_mask"), gradients))
        named["grad_input"] = named["grad_input"].to(acc)
        return {"output": output, **named}

    sizes = [batch, channels, groups]
    for one in (height, width):
        sizes += [one, one, 3, 1, 1, 1]
    tensors = [x, offset, mask, grad]
    name = f"deform_aggregate, {groups} groups"
    return Problem(name, 2, dtype, [*sizes, int(remove_center)], [scale], tensors, compute)


def roi_pool(
    random: torch.Generator, dtype: torch.dtype, out_channels: int, position_sensitive: bool
) -> Problem:
    batch, height, width, rois, bins, groups = 2, 12, 15, 6, 3, 2
    acc = coordinates(dtype)
    channels = out_channels * (bins * bins if position_sensitive else 1)
    x = _drawn(random, dtype, batch, channels, height, width)
    corner = torch.rand(rois, 2, generator=random, dtype=torch.float64) * 40
    extent = torch.rand(rois, 2, generator=random, dtype=torch.float64) * 30 + 4
    number = torch.arange(rois).remainder(batch)[:, None]
    boxes = torch.cat([number, corner, corner + extent], 1).to(acc)
    offset = _drawn(random, acc, rois, 2 * groups, bins, bins)
    grad = _drawn(random, dtype, rois, out_channels, bins, bins)

    def compute() -> dict[str, Tensor]:
        steps = ([bins, bins], 0.25, 2, 0.1, position_sensitive)
        output = torch.ops.mmdcn.deform_roi_pool(x, boxes, offset, *steps)
        gradients = torch.ops.mmdcn.deform_roi_pool_backward(
            grad, x, boxes, offset, *steps, [True, True]
        )
        grad_input = gradients[0].permute(0, 2, 3, 1).to(acc)
        return {"output": output, "grad_input": grad_input, "grad_offset": gradients[1]}

    sizes = [batch, channels, height, width, rois, out_channels, bins, bins, groups, 2]
    tensors = [x.permute(0, 2, 3, 1), boxes, offset, grad.permute(0, 2, 3, 1)]
    name = f"deform_roi_pool, {'by position' if position_sensitive else 'plain'}"
    return Problem(name, 3, dtype, [*sizes, int(position_sensitive)], [0.25, 0.1], tensors, compute)
