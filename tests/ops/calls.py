"""One small call of each public function of mmdcn.ops: what the contract of operators runs on.

A new operator needs an entry in CALLS; tests/ops/test_contract.py fails without it.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mmdcn import ops
from mmdcn.ops import reference

COORDINATES = ("offset", "mask", "offset_mask", "rois")  # may be float32 beside halves


@dataclasses.dataclass(frozen=True)
class Call:
    """A public function, its reference, and how to draw its tensors in float64.

    `draw` takes more pixels to each side of the image, so that sizes can vary. Sampling points lie
    away from whole numbers, where derivatives jump.
    """

    name: str
    draw: Callable[..., dict[str, Tensor]]
    arguments: dict
    constant: tuple[str, ...] = ()  # the tensors that nothing is differentiated for
    # Multiply-adds of the forward pass, by hand.
    multiply_adds: int = 0

    @property
    def function(self) -> Callable[..., Tensor]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(reference, self.name)

    def tensors(self, dtype: torch.dtype = torch.float64, more: int = 0, **settings) -> dict:
        torch.manual_seed(7)
        drawn = self.draw(more, **settings)
        return {name: t.to(dtype) for name, t in drawn.items()}

    def on(self, function: Callable[..., Tensor], names) -> Callable[..., Tensor]:
        """The function of these tensors by position."""
        return lambda *values: function(**dict(zip(names, values)), **self.arguments)

    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors() if name not in self.constant)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def fractions(*shape: int) -> Tensor:
    """Offsets that leave the grid by 0.1 to 0.9 of a pixel, or by one more or less."""
    whole = torch.randint(-1, 2, shape).double()
    return whole + 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64)


def convolution(
    size: tuple[int, ...], kernel: tuple[int, ...], geometry: dict, has_mask: bool
) -> Callable[..., dict]:
    """Tensors of 4 channels in 2 groups, and 2 offset groups."""

    def draw(more: int, batch: int = 2) -> dict[str, Tensor]:
        larger = tuple(n + more for n in size)
        out_size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(larger, kernel, *geometry.values())
        )
        samples = 2 * torch.Size(kernel).numel()
        tensors = {
            "input": normal(batch, 4, *larger),
            "offset": fractions(batch, len(size) * samples, *out_size),
            "weight": normal(6, 2, *kernel) / 3,
            "bias": normal(6),
        }
        if has_mask:
            tensors["mask"] = torch.rand(batch, samples, *out_size, dtype=torch.float64)
        return tensors

    return draw


def aggregation(packed: bool) -> Callable[..., dict]:
    """Tensors of 6 channels in 2 groups, for a kernel of 3 by 3."""

    def draw(more: int, batch: int = 2) -> dict[str, Tensor]:
        height, width = 5 + more, 4 + more
        offset, mask = fractions(batch, height, width, 2, 18), normal(batch, height, width, 2, 9)
        tensors = {"input": normal(batch, height, width, 6)}
        if packed:
            return tensors | {"offset_mask": torch.cat([offset, mask], dim=-1).flatten(3)}
        return tensors | {"offset": offset.flatten(3), "mask": mask.flatten(3)}

    return draw


def roi_pooling(channels: int) -> Callable[..., dict]:
    def draw(more: int, batch: int = 3) -> dict[str, Tensor]:
        corners = 1 + 4 * torch.rand(batch, 2, dtype=torch.float64)
        ends = corners + 3 + 6 * torch.rand(batch, 2, dtype=torch.float64)
        image = torch.arange(batch, dtype=torch.float64).remainder(2).unsqueeze(1)
        return {
            "input": normal(2, channels, 7 + more, 8 + more),
            "rois": torch.cat([image, corners, ends], dim=1),
            "offset": normal(batch, 4, 2, 3) / 4,
        }

    return draw


# Offset groups, a stride, padding and dilation that differ by dimension.
GEOMETRY = {
    1: dict(stride=(2,), padding=(1,), dilation=(2,)),
    2: dict(stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    3: dict(stride=(2, 1, 1), padding=(1, 1, 0), dilation=(1, 2, 1)),
}


def convolutions(name: str, size: tuple[int, ...], kernel: tuple[int, ...]) -> dict[str, Call]:
    geometry = GEOMETRY[len(size)]
    outputs = 2 * 6
    for n, k, s, p, d in zip(size, kernel, *geometry.values()):
        outputs *= (n + 2 * p - d * (k - 1) - 1) // s + 1
    by_hand = outputs * 2 * torch.Size(kernel).numel()
    return {
        f"{name}-{version}": Call(
            name,
            convolution(size, kernel, geometry, version == "v2"),
            geometry,
            multiply_adds=by_hand,
        )
        for version in ("v1", "v2")
    }


AGGREGATION = dict(kernel_size=3, padding=1, group=2)
POOLING = dict(output_size=(2, 3), spatial_scale=0.5, sampling_ratio=2, gamma=0.3)
CALLS: dict[str, Call] = {
    **convolutions("deform_conv1d", (9,), (3,)),
    **convolutions("deform_conv2d", (5, 6), (3, 2)),
    **convolutions("deform_conv3d", (4, 5, 3), (2, 2, 2)),
    "dcnv3": Call("dcnv3", aggregation(False), AGGREGATION, multiply_adds=4 * 2 * 20 * 6 * 9),
    "dcnv4": Call(
        "dcnv4",
        aggregation(True),
        AGGREGATION,
        multiply_adds=4 * 2 * 20 * 6 * 9,
    ),
    "deform_roi_pool": Call(
        "deform_roi_pool",
        roi_pooling(4),
        POOLING,
        constant=("rois",),
        multiply_adds=4 * 3 * 4 * 6 * 4,
    ),
    "deform_roi_pool-position_sensitive": Call(
        "deform_roi_pool",
        roi_pooling(24),
        POOLING | {"position_sensitive": True},
        constant=("rois",),
        multiply_adds=4 * 3 * 4 * 6 * 4,
    ),
}
