"""Randomly drawn problems of deformable RoI pooling, and their comparison with the reference."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_roi_pool, reference
from tests.ops.problems import TOLERANCE, divisors, exact, largest_error, run

NAMES = ("input", "rois", "offset")


@dataclasses.dataclass
class RoIProblem:
    """Sizes of one call; `channels` are the output's. No deform_groups means no offsets.

    Where `dyadic`, all numbers have so few digits that float32 computes every coordinate exactly: a
    rounding that moves a point across an integer, where the gradient jumps, is no error.
    """

    batch: int = 2
    channels: int = 4
    height: int = 9
    width: int = 11
    rois: int = 5
    output_size: tuple[int, int] = (2, 4)
    spatial_scale: float = 0.25
    sampling_ratio: int = 2
    gamma: float = 0.5
    deform_groups: int = 1
    position_sensitive: bool = False
    channels_last: bool = False
    float32_coordinates: bool = False
    dyadic: bool = True
    spread: float = 0.5
    seed: int = 0

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, rois and offset; the first and the last as leaves that require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def rounded(values: Tensor, digits: int) -> Tensor:
            return (values * 2**digits).round() / 2**digits if self.dyadic else values

        bins = self.output_size[0] * self.output_size[1]
        channels = self.channels * (bins if self.position_sensitive else 1)
        x = normal(self.batch, channels, self.height, self.width)
        # Boxes of every kind: inside, across the border, outside, inverted, and without a size.
        size = torch.tensor([self.width, self.height], dtype=torch.float64) / self.spatial_scale
        corner = torch.rand(self.rois, 2, generator=generator, dtype=torch.float64) * size
        extent = size / 3 * normal(self.rois, 2)
        extent[1::4] = extent[1::4].abs()
        extent[3::8] = 0
        corner[5::8] += 3 * size
        boxes = rounded(torch.cat([corner, corner + extent], dim=1), 1)
        image = torch.randint(self.batch, (self.rois, 1), generator=generator)
        offset = None
        if self.deform_groups:
            offset = rounded(
                self.spread * normal(self.rois, 2 * self.deform_groups, *self.output_size), 5
            )
        wide = torch.float32 if self.float32_coordinates and dtype != torch.float64 else dtype
        x = x.to(device, dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return {
            "input": x.requires_grad_(),
            "rois": torch.cat([image.double(), boxes], dim=1).to(device, wide),
            "offset": None if offset is None else offset.to(device, wide).requires_grad_(),
        }

    def arguments(self) -> dict:
        names = ("output_size", "spatial_scale", "sampling_ratio", "gamma", "position_sensitive")
        return {name: getattr(self, name) for name in names}


@st.composite
def roi_problems(draw, dyadic: bool) -> RoIProblem:
    """Problems that fit in a test, of every kind that the operator takes."""
    sizes = [1, 2, 4] if dyadic else [1, 2, 3, 5, 7]
    position_sensitive = draw(st.booleans())
    # Sizes around 16, 32 and 64 cross the borders of registers and of blocks of channels.
    channels = draw(st.sampled_from([1, 3, 6] if position_sensitive else [1, 3, 6, 17, 32, 70]))
    return RoIProblem(
        batch=draw(st.integers(1, 3)),
        channels=channels,
        height=draw(st.integers(1, 14)),
        width=draw(st.integers(1, 14)),
        rois=draw(st.integers(1, 9)),
        output_size=(draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))),
        spatial_scale=draw(st.sampled_from([0.25, 0.5, 1.0])),
        sampling_ratio=draw(st.sampled_from([0, 1, 2, 4] if dyadic else [0, 1, 2, 3, 11])),
        gamma=0.5,
        deform_groups=draw(st.sampled_from([0, *divisors(channels)])),
        position_sensitive=position_sensitive,
        channels_last=draw(st.booleans()),
        float32_coordinates=draw(st.booleans()),
        dyadic=dyadic,
        spread=draw(st.sampled_from([0.1, 1.0, 6.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def exact_roi_tensors(tensors: dict) -> dict:
    """The same values in float64 on the CPU; the features and the offsets as new leaves."""
    copies = exact(tensors)
    return {**copies, "rois": copies["rois"].detach()}


def run_roi_pool(function, tensors: dict, grad_output: Tensor | None = None, **arguments) -> dict:
    """Output and gradients by name, as :func:`tests.ops.problems.run`; rois have none."""
    results = run(function, tensors, grad_output, **arguments)
    assert results.pop("grad_rois") is None
    return results


def compare_roi_pool(
    problem: RoIProblem, dtype: torch.dtype, function=deform_roi_pool, device: str = "cpu"
) -> None:
    """Forward and every gradient against the reference in float64."""
    tensors = problem.tensors(dtype, device)
    shape = (problem.rois, problem.channels, *problem.output_size)
    # Rounded once, so that both sides differentiate along the same direction.
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run_roi_pool(function, tensors, grad_output, **problem.arguments())
    expected = run_roi_pool(
        reference.deform_roi_pool,
        exact_roi_tensors(tensors),
        grad_output.double(),
        **problem.arguments(),
    )
    assert actual["output"].shape == shape
    assert actual["output"].dtype == dtype
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = largest_error(actual[name], value)
        assert error <= TOLERANCE[dtype], f"{name} of {problem}: error {error:.2e}"
