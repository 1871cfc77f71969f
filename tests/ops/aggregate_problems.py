"""Randomly drawn problems of deformable aggregation."""

import dataclasses
from random import Random

import torch
from hypothesis import strategies as st

from mmdcn.ops import dcnv3, reference
from tests.ops.problems import WindowProblem, divisors, drawn_by, rounded, smallest_size


@dataclasses.dataclass
class AggregateProblem(WindowProblem):
    """Sizes of one call of DCNv3."""

    channels: int = 8
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    group: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False

    function = staticmethod(dcnv3)
    expected = staticmethod(reference.dcnv3)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.out_size, self.channels)

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, offset and mask of DCNv3 as leaves that require gradients."""
        _, normal = self.draws()
        positions, samples = (self.batch, *self.out_size), self.group * self.taps
        values = {
            "input": normal(self.batch, *self.size, self.channels),
            # Few enough digits for the scales too, by which offsets are multiplied.
            "offset": rounded(self.spread * normal(*positions, 2 * samples), 8),
            "mask": normal(*positions, samples),
        }
        return self.leaves(values, dtype, device)

    def packed(self, dtype: torch.dtype = torch.float64, padded: bool = False) -> dict:
        """The same call as DCNv4 takes it: input and offset_mask."""
        tensors = {name: t.detach() for name, t in self.tensors(dtype).items()}
        points = torch.cat(
            [tensors[name].unflatten(3, (self.group, -1)) for name in ("offset", "mask")], dim=-1
        ).flatten(3)
        if padded:
            points = torch.nn.functional.pad(points, (0, -points.shape[3] % 8), value=float("nan"))
        return {"input": tensors["input"].requires_grad_(), "offset_mask": points.requires_grad_()}

    def arguments(self) -> dict:
        return {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "group": self.group,
            "offset_scale": self.offset_scale,
            "remove_center": self.remove_center,
        }


def draw_aggregate_problem(random: Random) -> AggregateProblem:
    """A problem that fits in a test, of any kind that the operator takes."""

    def pair(low: int, high: int) -> tuple[int, int]:
        return random.randint(low, high), random.randint(low, high)

    remove_center = random.choice([False, True])
    odd = [(3, 3), (1, 3), (3, 1), (5, 3)]
    kernel = random.choice(odd) if remove_center else pair(1, 5)
    dilation, padding = pair(1, 3), pair(0, 3)
    # Sizes around 16, 32, 64 and 512 cross the borders of registers and of blocks of channels.
    channels = random.choice([1, 3, 4, 6, 12, 17, 32, 40, 70, 130, 520])
    size = [sum(n) for n in zip(smallest_size(kernel, padding, dilation), pair(0, 6))]
    # Images of 8 or 16 rows and more are divided into strips.
    size[0] += random.choice([0, 0, 8, 16])
    return AggregateProblem(
        batch=random.randint(1, 3),
        channels=channels,
        size=tuple(size),
        kernel=kernel,
        stride=pair(1, 3),
        padding=padding,
        dilation=dilation,
        group=random.choice(divisors(channels)),
        offset_scale=random.choice([1.0, 0.5, 2.0]),
        remove_center=remove_center,
        float32_offset=random.choice([False, True]),
        spread=random.choice([0.3, 2.0, 10.0]),
        seed=random.randint(0, 2**31),
    )


def aggregate_problems() -> st.SearchStrategy[AggregateProblem]:
    return drawn_by(draw_aggregate_problem)


def with_odd_strides(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, where nobody may look at the strides of dimensions of size one."""
    stride = [999 if n == 1 else step for n, step in zip(tensor.shape, tensor.stride())]
    return tensor.as_strided(tensor.shape, stride)


def assert_any_strides_of_size_one(operators, batch: int, height: int, width: int) -> None:
    """The compiled operators are right whatever strides the dimensions of size one have."""
    input = torch.randn(batch, height, width, 8)
    for packed in (False, True):  # packed as DCNv4 has them, in which no tensor is contiguous
        points = torch.randn(batch, height, width, 2, 27)
        good = points[..., :18].contiguous(), points[..., 18:].contiguous()
        odd = (points[..., :18], points[..., 18:]) if packed else good
        odd = [with_odd_strides(tensor) for tensor in odd]
        geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1.0, False)
        expected = operators.deform_aggregate(input, *good, *geometry)
        assert torch.equal(operators.deform_aggregate(input, *odd, *geometry), expected)
        arguments = (*geometry, [True] * 3)
        expected = operators.deform_aggregate_backward(input, input, *good, *arguments)
        actual = operators.deform_aggregate_backward(input, input, *odd, *arguments)
        for one, other in zip(actual, expected):
            assert torch.equal(one, other)
