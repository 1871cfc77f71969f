"""Randomly drawn problems of deformable convolution, and their comparison with the reference."""

import dataclasses
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_conv2d, reference

# Allowed error relative to the largest element. The reference computes in float64 on the same,
# already rounded inputs, so this is rounding of results and accumulation only.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
NAMES = ("input", "offset", "weight", "bias", "mask")


@dataclasses.dataclass
class Problem:
    """Sizes of one call; `kernel` to `dilation` are (height, width).

    `channels_last` is of the input, `points_channels_last` of offset and mask.
    """

    batch: int = 2
    channels: int = 4
    height: int = 7
    width: int = 8
    out_channels: int = 6
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    deform_groups: int = 1
    has_mask: bool = True
    has_bias: bool = True
    channels_last: bool = False
    points_channels_last: bool = False
    weight_channels_last: bool = False
    float32_offset: bool = False
    spread: float = 2.0
    seed: int = 0

    @property
    def out_size(self) -> tuple[int, int]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (self.height, self.width), self.padding, self.dilation, self.kernel, self.stride
            )
        )

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, offset, weight, bias and mask as leaves that require gradients."""
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        taps = self.kernel[0] * self.kernel[1]
        samples = (self.batch, self.deform_groups * taps, *self.out_size)
        fan_in = self.channels // self.groups * taps
        tensors = {
            "input": normal(self.batch, self.channels, self.height, self.width),
            # Multiples of 2^-12: float32 then adds them to the grid without rounding. A rounding
            # that moves a sample across an integer, where the gradient jumps, is no error.
            "offset": (self.spread * normal(self.batch, 2 * samples[1], *self.out_size) * 4096)
            .round()
            .div(4096),
            "weight": normal(self.out_channels, self.channels // self.groups, *self.kernel)
            / fan_in**0.5,
            "bias": normal(self.out_channels) if self.has_bias else None,
            "mask": normal(*samples).sigmoid() if self.has_mask else None,
        }
        wide = torch.float32 if self.float32_offset and dtype != torch.float64 else dtype
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            tensor = tensor.to(device, wide if name in ("offset", "mask") else dtype)
            if name in self.channels_last_tensors:
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            tensors[name] = tensor.requires_grad_()
        return tensors

    @property
    def channels_last_tensors(self) -> set[str]:
        layouts = {
            "input": self.channels_last,
            "offset": self.points_channels_last,
            "mask": self.points_channels_last,
            "weight": self.weight_channels_last,
        }
        return {name for name, channels_last in layouts.items() if channels_last}

    def arguments(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def problems(draw) -> Problem:
    """Problems that fit in a test, of every kind that the operator takes."""
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, dilation = draw(pair(1, 4)), draw(pair(1, 3))
    stride, padding = draw(pair(1, 3)), draw(pair(0, 3))
    # Sizes around 16, 32 and 64 cross the borders of registers and of blocks of channels.
    channels = draw(st.sampled_from([1, 2, 3, 4, 6, 12, 17, 32, 40, 70]))
    groups = draw(st.sampled_from(divisors(channels)))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]
    return Problem(
        batch=draw(st.integers(1, 3)),
        channels=channels,
        height=smallest[0] + draw(st.integers(0, 8)),
        width=smallest[1] + draw(st.integers(0, 8)),
        out_channels=groups * draw(st.sampled_from([1, 2, 3, 5, 17, 33] if groups < 8 else [1, 2])),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=draw(st.sampled_from(divisors(channels))),
        has_mask=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        points_channels_last=draw(st.booleans()),
        weight_channels_last=draw(st.booleans()),
        float32_offset=draw(st.booleans()),
        spread=draw(st.sampled_from([0.3, 2.0, 20.0])),
        seed=draw(st.integers(0, 2**31)),
    )


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected element (or to 1, if that is smaller)."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return 0.0
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    return float(difference / expected.abs().max().clamp(min=1.0))


def run(function, tensors: dict, grad_output: Tensor | None = None, **arguments) -> dict:
    """Output and gradients of one call, by name; `grad_output` of None draws one."""
    output = function(**tensors, **arguments)
    if grad_output is None:
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).double()
    output.backward(grad_output.to(output.device, output.dtype))
    results = {"output": output.detach()}
    for name, tensor in tensors.items():
        if tensor is not None:
            results[f"grad_{name}"] = tensor.grad
    return results


def exact(tensors: dict) -> dict:
    """The same values in float64 on the CPU, as new leaves."""
    return {
        name: None if t is None else t.detach().double().cpu().contiguous().requires_grad_()
        for name, t in tensors.items()
    }


def assert_samples_nothing(function, tensors: dict, **arguments) -> None:
    """The output is the bias, and no gradient passes through the samples."""
    results = run(function, tensors, **arguments)
    bias = tensors["bias"].detach().view(1, -1, 1, 1)
    assert torch.equal(results["output"], bias.expand_as(results["output"]))
    for name in ("input", "offset", "weight", "mask"):
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0, name


def compare(
    problem,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    function: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    device: str = "cpu",
    tolerance: float | None = None,
) -> None:
    """Forward, into a result of this shape, and every gradient against the reference in float64."""
    tolerance = tolerance or TOLERANCE[dtype]
    tensors = problem.tensors(dtype, device)
    # Rounded once, so that both sides differentiate along the same direction.
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run(function, tensors, grad_output, **problem.arguments())
    wanted = run(expected, exact(tensors), grad_output.double(), **problem.arguments())
    assert actual["output"].shape == shape
    assert actual["output"].dtype == dtype
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        error = largest_error(actual[name], value)
        assert error <= tolerance, f"{name} of {problem}: error {error:.2e}"


def compare_with_reference(
    problem: Problem, dtype: torch.dtype, device: str = "cpu", tolerance: float | None = None
) -> None:
    """Forward and every gradient against the reference in float64."""
    shape = (problem.batch, problem.out_channels, *problem.out_size)
    compare(problem, shape, dtype, deform_conv2d, reference.deform_conv2d, device, tolerance)
