"""Randomly drawn problems of deformable convolution, and what the other operators' share with them:
how values are drawn, and the comparison with the reference."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from random import Random
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from mmdcn.ops import deform_conv1d, deform_conv2d, deform_conv3d, reference

# Allowed error relative to the largest element. The reference computes in float64 on the same,
# already rounded inputs, so this is rounding of results and accumulation only.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
DTYPES = list(TOLERANCE)
NAMES = ("input", "offset", "weight", "bias", "mask")
Drawn = TypeVar("Drawn")
FUNCTIONS = {1: deform_conv1d, 2: deform_conv2d, 3: deform_conv3d}


def wide(dtype: torch.dtype) -> torch.dtype:
    """That in which the compiled operators take coordinates beside features of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(values: Tensor, digits: int) -> Tensor:
    """Rounded to so many binary digits, that float32 computes coordinates exactly.

    A rounding that moves a sample across an integer, where the gradient jumps, is no error.
    """
    return (values * 2**digits).round() / 2**digits


# --------------------------------------------------------------------------------------- problems


@dataclasses.dataclass
class OperatorProblem:
    """What the problems of every operator have; tuples are by dimension, outermost first.

    `float32_offset` is of everything but features and weights. A subclass has `function` and
    `expected`, the operator and its reference, `out_shape`, `tensors()` and `arguments()`.
    """

    batch: int = 2
    channels: int = 4
    size: tuple[int, ...] = (7, 8)
    _: dataclasses.KW_ONLY
    float32_offset: bool = False
    spread: float = 2.0
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.size)

    @property
    def channels_last_tensors(self) -> set[str]:
        return set()

    def draws(self) -> tuple[torch.Generator, Callable[..., Tensor]]:
        """What draws this problem's values, and the normal distribution drawn from it."""
        generator = torch.Generator().manual_seed(self.seed)
        return generator, functools.partial(torch.randn, generator=generator, dtype=torch.float64)

    def leaves(self, values: dict, dtype: torch.dtype, device: str) -> dict:
        """These values as the problem has them; all but RoIs require gradients."""
        coordinates = wide(dtype) if self.float32_offset else dtype
        tensors = dict(values)
        for name, tensor in values.items():
            if tensor is not None:
                is_feature = name in ("input", "weight", "bias")
                tensor = tensor.to(device, dtype if is_feature else coordinates)
                if name in self.channels_last_tensors:
                    tensor = tensor.movedim(1, -1).contiguous().movedim(-1, 1)
                tensors[name] = tensor.requires_grad_(name != "rois")
        return tensors


class WindowProblem(OperatorProblem):
    """One whose kernel slides over the input; an int stands for the same in every dimension."""

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            if isinstance(getattr(self, name), int):
                setattr(self, name, (getattr(self, name),) * self.rank)

    @property
    def out_size(self) -> tuple[int, ...]:
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride
            )
        )


@dataclasses.dataclass
class Problem(WindowProblem):
    """Sizes of one call of deformable convolution, over as many dimensions as `size` has.

    `channels_last` is of the input, `points_channels_last` of offset and mask.
    """

    out_channels: int = 6
    kernel: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    deform_groups: int = 1
    has_mask: bool = True
    has_bias: bool = True
    channels_last: bool = False
    points_channels_last: bool = False
    weight_channels_last: bool = False

    expected = staticmethod(reference.deform_conv_nd)

    @property
    def function(self) -> Callable[..., Tensor]:
        return FUNCTIONS[self.rank]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.batch, self.out_channels, *self.out_size)

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        """input, offset, weight, bias and mask as leaves that require gradients."""
        _, normal = self.draws()
        taps = math.prod(self.kernel)
        samples = self.deform_groups * taps
        group_channels = self.channels // self.groups
        values = {
            "input": normal(self.batch, self.channels, *self.size),
            "offset": rounded(
                self.spread * normal(self.batch, self.rank * samples, *self.out_size), 12
            ),
            "weight": normal(self.out_channels, group_channels, *self.kernel)
            / (group_channels * taps) ** 0.5,
            "bias": normal(self.out_channels) if self.has_bias else None,
            "mask": normal(self.batch, samples, *self.out_size).sigmoid()
            if self.has_mask
            else None,
        }
        return self.leaves(values, dtype, device)

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


LINE = Problem(size=(9,))
LINE_VOLUME = Problem(size=(1, 9, 1), kernel=(1, 3, 1), padding=(0, 1, 0))
VOLUME = Problem(size=(4, 5, 6))


def compiled_arguments(problem: Problem, dtype: torch.dtype) -> tuple:
    """What the compiled operators of convolution take."""
    x, offset, weight, bias, mask = problem.tensors(dtype).values()
    offset, mask = (
        None if t is None else t.detach().to(wide(dtype)).requires_grad_() for t in (offset, mask)
    )
    geometry = (list(numbers) for numbers in problem.arguments().values())
    return x, offset, weight, bias, *geometry, mask


def detached(arguments: Iterable) -> list:
    """The same arguments, of which no tensor requires gradients."""
    return [a.detach() if isinstance(a, Tensor) else a for a in arguments]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def smallest_size(kernel, padding, dilation) -> list[int]:
    """Of an input on which the kernel has a place."""
    return [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding)]


def drawn_by(draw: Callable[[Random], Drawn]) -> st.SearchStrategy[Drawn]:
    """Hypothesis's draws of what is drawn from a random number generator."""
    return st.randoms(use_true_random=False).map(draw)


def draw_problem(random: Random, ranks: tuple[int, ...] = (2,)) -> Problem:
    """A problem that fits in a test, of any kind that the operator takes."""
    rank = random.choice(ranks)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(random.randint(low, high) for _ in range(rank))

    largest = 3 if rank == 3 else 4  # The reference would take long over larger volumes.
    kernel, dilation = each(1, largest), each(1, largest - 1)
    stride, padding = each(1, 3), each(0, largest - 1)
    # Sizes around 16, 32 and 64 cross the borders of registers and of blocks of channels.
    channels = random.choice([1, 2, 3, 4, 6, 12, 17, 32, 40, 70])
    groups = random.choice(divisors(channels))
    more = each(0, {1: 20, 2: 8, 3: 3}[rank])
    return Problem(
        batch=random.randint(1, 3),
        channels=channels,
        size=tuple(map(sum, zip(smallest_size(kernel, padding, dilation), more))),
        out_channels=groups * random.choice([1, 2, 3, 5, 17, 33] if groups < 8 else [1, 2]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=random.choice(divisors(channels)),
        has_mask=random.choice([False, True]),
        has_bias=random.choice([False, True]),
        channels_last=random.choice([False, True]),
        points_channels_last=random.choice([False, True]),
        weight_channels_last=random.choice([False, True]),
        float32_offset=random.choice([False, True]),
        spread=random.choice([0.3, 2.0, 20.0]),
        seed=random.randint(0, 2**31),
    )


def problems(ranks: tuple[int, ...] = (2,)) -> st.SearchStrategy[Problem]:
    return drawn_by(functools.partial(draw_problem, ranks=ranks))


# ------------------------------------------------------------------------------------- comparison


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
    # In the layout of the output, as most layers that follow leave it.
    output.backward(torch.empty_like(output).copy_(grad_output))
    results = {"output": output.detach()}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            results[f"grad_{name}"] = tensor.grad
        else:
            assert tensor is None or tensor.grad is None, name
    return results


def exact(tensors: dict) -> dict:
    """The same values in float64 on the CPU, as new leaves."""
    return {
        name: None
        if t is None
        else t.detach().double().cpu().contiguous().requires_grad_(t.requires_grad)
        for name, t in tensors.items()
    }


def assert_samples_nothing(function, tensors: dict, **arguments) -> None:
    """The output is the bias, and no gradient passes through the samples."""
    results = run(function, tensors, **arguments)
    output = results["output"]
    bias = tensors["bias"].detach().view(-1, *[1] * (output.ndim - 2))
    assert torch.equal(output, bias.expand_as(output))
    for name in ("input", "offset", "weight", "mask"):
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0, name


def compare(
    problem: OperatorProblem,
    dtype: torch.dtype,
    function: Callable[..., Tensor] | None = None,
    device: str = "cpu",
    tolerance: float | None = None,
    **options: bool,
) -> None:
    """Forward and every gradient against the reference in float64, which knows no options."""
    tolerance = tolerance or TOLERANCE[dtype]
    tensors = problem.tensors(dtype, device)
    # Rounded once, so that both sides differentiate along the same direction.
    grad_output = torch.randn(problem.out_shape, generator=torch.Generator().manual_seed(1))
    grad_output = grad_output.to(dtype)
    arguments = problem.arguments()
    actual = run(function or problem.function, tensors, grad_output, **arguments, **options)
    wanted = run(problem.expected, exact(tensors), grad_output.double(), **arguments)
    assert actual["output"].shape == problem.out_shape
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        assert actual[name].dtype == (
            dtype if name == "output" else tensors[name.removeprefix("grad_")].dtype
        )
        error = largest_error(actual[name], value)
        assert error <= tolerance, f"{name} of {problem}: error {error:.2e}"


def assert_gradient_alone(problem: OperatorProblem, wanted: str) -> None:
    """Asking for one gradient gives the same as asking for all, and computes no other."""
    expected = run(problem.function, problem.tensors(), **problem.arguments())
    tensors = problem.tensors()
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    actual = run(problem.function, tensors, **problem.arguments())
    assert torch.equal(actual[f"grad_{wanted}"], expected[f"grad_{wanted}"])
    assert actual.keys() == {"output", f"grad_{wanted}"}


def assert_same_bits(problem: OperatorProblem, dtype: torch.dtype) -> None:
    """Output and gradients are the same for 1, 2 and 5 threads."""
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(problem.function, problem.tensors(dtype), **problem.arguments()))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name
