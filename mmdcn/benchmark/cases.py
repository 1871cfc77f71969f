"""The problems that operators are timed on: named sets of shapes, and their tensors.

The command line offers what is named here, before torch is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from . import BenchmarkError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: torch's dtypes, with the bytes of an element.
DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
#: torch's memory format of each layout.
LAYOUTS = {"nchw": "contiguous_format", "channels_last": "channels_last"}
VERSIONS = ("v1", "v2")
#: What ours is compared with (:mod:`~.implementations`).
PEERS = ("dense", "mmcv", "onnxruntime", "openvino", "torchvision")
#: What a detector runs in beside eager PyTorch (:mod:`~.deployment`).
RUNTIMES = ("tuned", "compiled", "onnxruntime", "openvino")
#: Those of them that are PyTorch.
IN_PYTORCH = ("tuned", "compiled")
#: The other operators (:mod:`~.family`).
OTHER_OPERATORS = ("deform_conv1d", "deform_conv3d", "dcnv3", "dcnv4", "deform_roi_pool")


@dataclass(frozen=True)
class Case:
    """One deformable convolution.

    `version` is ``'v1'``, or ``'v2'`` for a mask beside the offsets. The kernel is square.
    """

    name: str
    batch: int
    channels: int
    out_channels: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    groups: int = 1
    deform_groups: int = 1
    version: str = "v2"
    layout: str = "nchw"
    dtype: str = "float32"

    @property
    def taps(self) -> int:
        return self.kernel**2

    @property
    def out_size(self) -> tuple[int, int]:
        def out(size: int) -> int:
            reach = self.dilation * (self.kernel - 1) + 1
            return (size + 2 * self.padding - reach) // self.stride + 1

        return out(self.height), out(self.width)

    @property
    def label(self) -> str:
        """The problem in words, without version, layout and dtype."""
        shape = f"{self.batch}, {self.channels}→{self.out_channels}, {self.height}×{self.width}"
        return shape if self.name == shape_name(self) else f"{shape}, {self.name}"

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass, two for each multiplication; a backward pass has double."""
        height, width = self.out_size
        per_output = 2 * self.channels // self.groups * self.taps
        return self.batch * self.out_channels * height * width * per_output

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor that goes in, and of the output."""
        points = self.deform_groups * self.taps
        weight = (self.out_channels, self.channels // self.groups, self.kernel, self.kernel)
        shapes = {
            "input": (self.batch, self.channels, self.height, self.width),
            "offset": (self.batch, 2 * points, *self.out_size),
            "weight": weight,
            "mask": (self.batch, points, *self.out_size),
            "output": (self.batch, self.out_channels, *self.out_size),
        }
        if self.version == "v1":
            del shapes["mask"]
        return shapes

    def bytes_moved(self, direction: str) -> int:
        """The least that memory must give and take: each tensor once in each pass."""
        sizes = {
            name: math.prod(shape) * self.element_size(name)
            for name, shape in self.shapes().items()
        }
        forward = sum(sizes.values())
        # The backward pass reads what the forward pass read and the output's gradient, and writes
        # the gradients of what went in.
        backward = forward + sum(sizes.values()) - sizes["output"]
        return forward if direction == "forward" else forward + backward

    def element_size(self, tensor: str) -> int:
        wide = tensor in ("offset", "mask") and self.dtype != "float64"
        return DTYPES["float32" if wide else self.dtype]

    def arguments(self) -> dict[str, int]:
        """Stride, padding and dilation, as functions of torch take them."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def describe(self) -> dict:
        """The case as it is written in JSON."""
        return {**asdict(self), "label": self.label, "flops": self.flops}


def shape_name(case: Case) -> str:
    return f"{case.batch}x{case.channels}x{case.height}x{case.width}"


def _square(batch: int, channels: int, height: int, width: int, **more) -> Case:
    case = Case("", batch, channels, channels, height, width, **more)
    return replace(case, name=shape_name(case))


_MIDDLE = Case("", 1, 256, 256, 50, 68)

SHAPES: dict[str, tuple[Case, ...]] = {
    # The shapes that the operator meets in a detector, at four places.
    "design": (
        _square(1, 128, 40, 54),
        _square(1, 256, 50, 68),
        _square(1, 512, 25, 34),
        _square(2, 128, 100, 136),
    ),
    # One of these with each argument that changes how it is computed.
    "variants": (
        replace(_MIDDLE, name="stride 2", stride=2),
        replace(_MIDDLE, name="deform_groups 4", deform_groups=4),
        replace(_MIDDLE, name="deform_groups 256", deform_groups=256),
        replace(_MIDDLE, name="5×5", kernel=5, padding=2),
        replace(_MIDDLE, name="dilation 2", dilation=2, padding=2),
        replace(_square(1, 256, 32, 32, groups=32), name="32 groups"),
        replace(_square(1, 256, 32, 32, groups=256), name="depthwise"),
        replace(_square(1, 96, 56, 56, groups=96), name="depthwise"),
    ),
    # The 3 × 3 convolutions of R-50 at 800 × 1333.
    "r50": (
        Case("c3", 1, 128, 128, 100, 168),
        Case("c4", 1, 256, 256, 50, 84),
        Case("c5", 1, 512, 512, 25, 42),
    ),
}


def find_shapes(name: str) -> tuple[Case, ...]:
    """The shapes of a name of :data:`SHAPES`, or ``NxCxHxW``, or ``NxCxHxW:Co``.

    Raises:
        BenchmarkError: it is none of these.
    """
    if name in SHAPES:
        return SHAPES[name]
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(?::([1-9]\d*))?", name)
    if match is None:
        raise BenchmarkError(
            f"expected {', '.join(SHAPES)}, or batch, channels, height and width as in 1x64x32x32 "
            f"(1x64x32x32:128 for 128 output channels), got {name!r}"
        )
    batch, channels, height, width = map(int, match.group(1, 2, 3, 4))
    case = _square(batch, channels, height, width)
    return (replace(case, out_channels=int(match.group(5) or channels)),)


def expand(
    shapes: list[str],
    versions: list[str],
    layouts: list[str],
    dtypes: list[str],
    batches: list[int] | None = None,
) -> list[Case]:
    """Every combination; `batches` replaces the batch size of each shape."""

    def combine() -> Iterator[Case]:
        for case in [case for name in shapes for case in find_shapes(name)]:
            for batch in batches or [case.batch]:
                sized = replace(case, batch=batch)
                if case.name == shape_name(case):
                    sized = replace(sized, name=shape_name(sized))
                for version in versions:
                    for dtype in dtypes:
                        for layout in layouts:
                            yield replace(sized, dtype=dtype, version=version, layout=layout)

    return list(dict.fromkeys(combine()))


def make_tensors(case: Case, device: torch.device, offset_std: float) -> dict[str, Tensor]:
    """Tensors of a case by the names of :meth:`Case.shapes`, in float32, always the same.

    ``grad_output`` is the gradient that the output gets.
    """
    import torch

    generator = torch.Generator(device).manual_seed(0)
    shapes = case.shapes()
    shapes["grad_output"] = shapes.pop("output")
    tensors = {
        name: torch.randn(shape, generator=generator, device=device)
        for name, shape in shapes.items()
    }
    tensors["weight"] /= (case.channels // case.groups * case.taps) ** 0.5
    tensors["offset"] *= offset_std
    if "mask" in tensors:
        tensors["mask"].sigmoid_()
    return tensors
