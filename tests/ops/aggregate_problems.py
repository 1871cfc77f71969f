"""Randomly drawn problems of deformable aggregation, and their comparison with the reference."""

import dataclasses
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import dcnv3, reference
from tests.ops.problems import compare, divisors


@dataclasses.dataclass
class AggregateProblem:
    """Sizes of one call; `kernel` to `dilation` are (height, width)."""

    batch: int = 2
    channels: int = 8
    height: int = 7
    width: int = 8
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    group: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False
    float32_points: bool = False
    spread: float = 2.0
    seed: int = 0

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1] - self.remove_center

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, self.stride
            )
        )

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, offset and mask of DCNv3 as leaves that require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        samples = (self.batch, *self.out_size, self.group * self.taps)
        # Multiples of 2^-8, and scales too: every coordinate is exact in float32. A rounding that
        # moves a sample across an integer, where the gradient jumps, is no error.
        offset = (self.spread * normal(*samples[:3], 2 * samples[3]) * 256).round() / 256
        wide = torch.float32 if self.float32_points and dtype != torch.float64 else dtype
        tensors = {
            "input": normal(self.batch, self.height, self.width, self.channels).to(dtype),
            "offset": offset.to(wide),
            "mask": normal(*samples).to(wide),
        }
        return {name: t.to(device).requires_grad_() for name, t in tensors.items()}

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


@st.composite
def aggregate_problems(draw) -> AggregateProblem:
    """Problems that fit in a test, of every kind that the operator takes."""
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    remove_center = draw(st.booleans())
    odd = st.sampled_from([(3, 3), (1, 3), (3, 1), (5, 3)])
    kernel = draw(odd if remove_center else pair(1, 5))
    dilation, padding = draw(pair(1, 3)), draw(pair(0, 3))
    # Sizes around 16, 32 and 64 cross the borders of registers and of blocks of channels.
    channels = draw(st.sampled_from([1, 3, 4, 6, 12, 17, 32, 40, 70, 130]))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]
    return AggregateProblem(
        batch=draw(st.integers(1, 3)),
        channels=channels,
        height=smallest[0] + draw(st.integers(0, 6)),
        width=smallest[1] + draw(st.integers(0, 6)),
        kernel=kernel,
        stride=draw(pair(1, 3)),
        padding=padding,
        dilation=dilation,
        group=draw(st.sampled_from(divisors(channels))),
        offset_scale=draw(st.sampled_from([1.0, 0.5, 2.0])),
        remove_center=remove_center,
        float32_points=draw(st.booleans()),
        spread=draw(st.sampled_from([0.3, 2.0, 10.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def compare_aggregate(
    problem: AggregateProblem,
    dtype: torch.dtype,
    function: Callable[..., Tensor] = dcnv3,
    device: str = "cpu",
) -> None:
    """Forward and every gradient against the reference in float64."""
    shape = (problem.batch, *problem.out_size, problem.channels)
    compare(problem, shape, dtype, function, reference.dcnv3, device)
