"""Randomly drawn problems of deformable RoI pooling."""

import dataclasses
import functools
import math
from random import Random

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_roi_pool, reference
from tests.ops.problems import OperatorProblem, divisors, drawn_by, rounded


@dataclasses.dataclass
class RoIProblem(OperatorProblem):
    """Sizes of one call; `channels` are the output's. No deform_groups means no offsets.

    Where `dyadic`, all numbers have so few digits that float32 computes every coordinate exactly.
    """

    size: tuple[int, int] = (9, 11)
    rois: int = 5
    output_size: tuple[int, int] = (2, 4)
    spatial_scale: float = 0.25
    sampling_ratio: int = 2
    gamma: float = 0.5
    deform_groups: int = 1
    position_sensitive: bool = False
    _: dataclasses.KW_ONLY
    channels_last: bool = False
    dyadic: bool = True
    spread: float = 0.5

    function = staticmethod(deform_roi_pool)
    expected = staticmethod(reference.deform_roi_pool)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.rois, self.channels, *self.output_size)

    @property
    def channels_last_tensors(self) -> set[str]:
        return {"input"} if self.channels_last else set()

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, rois and offset; the first and the last as leaves that require gradients."""
        generator, normal = self.draws()

        def limited(values: Tensor, digits: int) -> Tensor:
            return rounded(values, digits) if self.dyadic else values

        bins = math.prod(self.output_size) if self.position_sensitive else 1
        x = normal(self.batch, self.channels * bins, *self.size)
        # Boxes of every kind: inside, across the border, outside, inverted, and without a size.
        size = torch.tensor(self.size[::-1], dtype=torch.float64) / self.spatial_scale
        corner = torch.rand(self.rois, 2, generator=generator, dtype=torch.float64) * size
        extent = size / 3 * normal(self.rois, 2)
        extent[1::4] = extent[1::4].abs()
        extent[3::8] = 0
        corner[5::8] += 3 * size
        boxes = limited(torch.cat([corner, corner + extent], dim=1), 1)
        image = torch.randint(self.batch, (self.rois, 1), generator=generator)
        offset = None
        if self.deform_groups:
            offset = limited(
                self.spread * normal(self.rois, 2 * self.deform_groups, *self.output_size), 5
            )
        values = {"input": x, "rois": torch.cat([image.double(), boxes], dim=1), "offset": offset}
        return self.leaves(values, dtype, device)

    def arguments(self) -> dict:
        names = ("output_size", "spatial_scale", "sampling_ratio", "gamma", "position_sensitive")
        return {name: getattr(self, name) for name in names}


def draw_roi_problem(random: Random, dyadic: bool) -> RoIProblem:
    """A problem that fits in a test, of any kind that the operator takes."""
    sizes = [1, 2, 4] if dyadic else [1, 2, 3, 5, 7]
    position_sensitive = random.choice([False, True])
    # Sizes around 16, 32 and 64 cross the borders of registers and of blocks of channels.
    channels = random.choice([1, 3, 6] if position_sensitive else [1, 3, 6, 17, 32, 70])
    return RoIProblem(
        batch=random.randint(1, 3),
        channels=channels,
        size=(random.randint(1, 14), random.randint(1, 14)),
        rois=random.randint(1, 9),
        output_size=(random.choice(sizes), random.choice(sizes)),
        spatial_scale=random.choice([0.25, 0.5, 1.0]),
        sampling_ratio=random.choice([0, 1, 2, 4] if dyadic else [0, 1, 2, 3, 11]),
        gamma=0.5,
        deform_groups=random.choice([0, *divisors(channels)]),
        position_sensitive=position_sensitive,
        channels_last=random.choice([False, True]),
        float32_offset=random.choice([False, True]),
        dyadic=dyadic,
        spread=random.choice([0.1, 1.0, 6.0]),
        seed=random.randint(0, 2**31),
    )


def roi_problems(dyadic: bool) -> st.SearchStrategy[RoIProblem]:
    return drawn_by(functools.partial(draw_roi_problem, dyadic=dyadic))
