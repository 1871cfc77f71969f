"""Randomly drawn problems of deformable convolution over any number of dimensions."""

import dataclasses
import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_conv1d, deform_conv3d, reference
from tests.ops.problems import compare, divisors

FUNCTIONS = {1: deform_conv1d, 3: deform_conv3d}


@dataclasses.dataclass
class NdProblem:
    """Sizes of one call; tuples are by dimension, outermost first."""

    size: tuple[int, ...] = (4, 5, 6)
    batch: int = 2
    channels: int = 4
    out_channels: int = 6
    kernel: tuple[int, ...] = (3, 3, 3)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (1, 1, 1)
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    deform_groups: int = 1
    has_mask: bool = True
    has_bias: bool = True
    float32_offset: bool = False
    spread: float = 2.0
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride
            )
        )

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, offset, weight, bias and mask as leaves that require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        taps = math.prod(self.kernel)
        samples = self.deform_groups * taps
        group_channels = self.channels // self.groups
        # Multiples of 2^-12, so that no rounding moves a sample across an integer, where the
        # gradient jumps.
        offset = self.spread * normal(self.batch, self.rank * samples, *self.out_size)
        weight = normal(self.out_channels, group_channels, *self.kernel)
        tensors = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": (offset * 4096).round() / 4096,
            "weight": weight / (group_channels * taps) ** 0.5,
            "bias": normal(self.out_channels) if self.has_bias else None,
            "mask": normal(self.batch, samples, *self.out_size).sigmoid()
            if self.has_mask
            else None,
        }
        wide = torch.float32 if self.float32_offset and dtype != torch.float64 else dtype
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(device, wide if name in ("offset", "mask") else dtype)
                tensors[name] = tensor.requires_grad_()
        return tensors

    def arguments(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


LINE = NdProblem((9,), kernel=(3,), stride=(1,), padding=(1,), dilation=(1,))
LINE_VOLUME = NdProblem((1, 9, 1), kernel=(1, 3, 1), padding=(0, 1, 0))
VOLUME = NdProblem()


@st.composite
def nd_problems(draw, ranks: tuple[int, ...] = (1, 3)) -> NdProblem:
    """Problems that fit in a test, of every kind that the operator takes."""
    rank = draw(st.sampled_from(ranks))
    each = lambda low, high: st.tuples(*[st.integers(low, high)] * rank)  # noqa: E731
    kernel, dilation = draw(each(1, 3)), draw(each(1, 2))
    stride, padding = draw(each(1, 3)), draw(each(0, 2))
    # Sizes around 16, 32 and 64 cross the borders of registers and of parts of channels.
    channels = draw(st.sampled_from([1, 2, 3, 6, 12, 17, 40, 70]))
    groups = draw(st.sampled_from(divisors(channels)))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]
    more = draw(each(0, 20 if rank == 1 else 3))
    return NdProblem(
        size=tuple(s + m for s, m in zip(smallest, more)),
        batch=draw(st.integers(1, 3)),
        channels=channels,
        out_channels=groups * draw(st.sampled_from([1, 2, 5, 17, 33] if groups < 8 else [1, 2])),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=draw(st.sampled_from(divisors(channels))),
        has_mask=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        float32_offset=draw(st.booleans()),
        spread=draw(st.sampled_from([0.3, 2.0, 20.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def compare_nd(
    problem: NdProblem,
    dtype: torch.dtype,
    function: Callable[..., Tensor] | None = None,
    device: str = "cpu",
) -> None:
    """Forward and every gradient against the reference in float64."""
    shape = (problem.batch, problem.out_channels, *problem.out_size)
    function = function or FUNCTIONS[problem.rank]
    compare(problem, shape, dtype, function, reference.deform_conv_nd, device)
