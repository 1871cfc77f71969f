"""Deformable convolution over one, two and three dimensions: what is decided for all of them."""

import dataclasses

import pytest
import torch

from mmdcn.ops import reference
from tests.ops.problems import (
    DTYPES,
    LINE,
    NAMES,
    VOLUME,
    Problem,
    assert_gradient_alone,
    assert_same_bits,
    assert_samples_nothing,
    exact,
    largest_error,
    run,
)

EVERY_RANK = pytest.mark.parametrize("problem", [LINE, Problem(), VOLUME], ids=["1d", "2d", "3d"])


@EVERY_RANK
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("float32_offset", [False, True], ids=["narrow", "float32"])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 1e30, -1e30]
)
def test_offsets_that_reach_nothing(value, float32_offset, dtype, problem):
    """Whatever the coordinate and the modulation, the sample is zero; so is every gradient."""
    problem = dataclasses.replace(problem, out_channels=3, float32_offset=float32_offset)
    if dtype == torch.float16 and not float32_offset and abs(value) == 1e30:
        value = 6e4 if value > 0 else -6e4
    for modulation in (1.0, float("nan")):
        tensors = problem.tensors(dtype)
        with torch.no_grad():
            tensors["offset"].fill_(value)
            tensors["mask"].mul_(modulation)
        assert_samples_nothing(problem.function, tensors, **problem.arguments())


@EVERY_RANK
def test_one_bad_coordinate_leaves_the_others_alone(problem):
    position = tuple(n // 2 for n in problem.out_size)
    for channel in range(problem.rank + 2):
        tensors = problem.tensors()
        with torch.no_grad():
            tensors["offset"][(0, channel, *position)] = float("nan")
        actual = run(problem.function, tensors, **problem.arguments())
        expected = run(reference.deform_conv_nd, exact(tensors), **problem.arguments())
        for name, value in expected.items():
            assert torch.isfinite(actual[name]).all(), name
            assert largest_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize(
    "problem",
    [
        Problem(size=(0,), padding=3),
        Problem(size=(0, 5), padding=3),
        Problem(size=(4, 0), padding=3),
        Problem(size=(0, 0), padding=3),
        Problem(size=(2, 0, 3), padding=(1, 3, 1)),
    ],
    ids=lambda problem: str(problem.size),
)
def test_input_without_pixels(problem, has_mask, dtype):
    """Where the padding alone is larger than the kernel, the output is the bias."""
    problem = dataclasses.replace(problem, has_mask=has_mask)
    tensors = problem.tensors(dtype)
    output = problem.function(**tensors, **problem.arguments())
    bias = tensors["bias"].view(-1, *[1] * problem.rank)
    assert torch.equal(output, bias.expand(problem.out_shape))
    output.sum().backward()
    assert tensors["input"].grad.shape == tensors["input"].shape
    for name in ("offset", "weight", "mask")[: 3 if has_mask else 2]:
        assert torch.count_nonzero(tensors[name].grad) == 0, name
    ones = torch.full((6,), float(output[:, 0].numel()), dtype=dtype)
    assert torch.equal(tensors["bias"].grad, ones)


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize(
    "problem",
    [dataclasses.replace(LINE, channels=80), Problem(1, 40, (6, 5), 6)],
    ids=["1d", "2d"],
)
def test_each_gradient_alone(problem, wanted):
    assert_gradient_alone(problem, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        Problem(2, 130, (20, 21), 40, deform_groups=2),
        Problem(2, 130, (20, 21), 40, deform_groups=2, channels_last=True),
        Problem(1, 24, (70, 9), 40, spread=25.0),
        Problem(1, 72, (30, 21), 40, deform_groups=36, points_channels_last=True),
        Problem(1, 128, (256, 20), 10),  # weights that are packed by several threads
        # Few pixels to many output channels: each thread has channels of its own.
        Problem(2, 128, (12, 9), 256),
        Problem(2, 64, (6, 9), 128, channels_last=True),
        Problem(2, 140, (20, 21), 140, groups=140, channels_last=True),
        Problem(2, 350, (6, 7), 350),  # weights of which each thread holds a block's at a time
        dataclasses.replace(LINE, size=(3000,), channels=100, out_channels=40),
        dataclasses.replace(VOLUME, size=(7, 12, 13), channels=48, groups=2, deform_groups=3),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(problem, dtype):
    assert_same_bits(problem, dtype)


@EVERY_RANK
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_coordinate_that_rounds_to_zero_lies_below_it(dtype, problem):
    """-1e-17 plus 1 is 1: the sample is between pixels -1 and 0, whose difference is its slope."""
    rank, one = problem.rank, torch.ones(1, 1, *[1] * problem.rank, dtype=dtype)
    offset = torch.full((1, rank, *[1] * rank), -1e-17, dtype=dtype, requires_grad=True)
    output = problem.function(3 * one, offset, one, None)
    output.sum().backward()
    assert torch.equal(output.detach(), 3 * one)
    assert torch.equal(offset.grad, torch.full_like(offset, 3.0))
