"""Deformable convolutions on a GPU against the reference and the CPU.

``tools/gpu_check.sh`` runs these on a GPU machine, from an installed wheel.
"""

import random

import pytest
import torch

from mmdcn.ops import deform_conv2d, reference
from tests.cuda.gpu import MARKS, ONE_OF_EACH_RANK, PROBLEMS, needs_memory
from tests.ops.problems import (
    DTYPES,
    NAMES,
    TOLERANCE,
    Problem,
    assert_samples_nothing,
    compare,
    divisors,
    exact,
    largest_error,
    run,
    smallest_size,
)

pytestmark = MARKS


def random_problem(seed: int) -> Problem:
    draw = random.Random(seed)
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
    kernel, dilation, stride, padding = pair(1, 4), pair(1, 3), pair(1, 3), pair(0, 3)
    channels = draw.choice([1, 3, 4, 12, 17, 40, 64, 70, 130])
    groups = draw.choice(divisors(channels))
    return Problem(
        batch=draw.randint(1, 3),
        channels=channels,
        size=tuple(map(sum, zip(smallest_size(kernel, padding, dilation), pair(0, 20)))),
        out_channels=groups * draw.choice([1, 5, 33, 70] if groups < 8 else [1, 3]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=draw.choice(divisors(channels)),
        has_mask=draw.random() < 0.5,
        has_bias=draw.random() < 0.5,
        channels_last=draw.random() < 0.5,
        float32_offset=draw.random() < 0.5,
        spread=draw.choice([0.3, 2.0, 20.0]),
        seed=seed,
    )


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_matches_reference(dtype, seed):
    compare(random_problem(seed), dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 256, "out_channels": 256, "size": (50, 84)},
        {"channels": 64, "out_channels": 128, "size": (25, 42), "deform_groups": 64},
        {"channels": 64, "out_channels": 64, "size": (25, 42), "groups": 64},
        {"channels": 3, "out_channels": 64, "size": (60, 61), "kernel": (7, 7)},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_matches_cpu_on_real_sizes(dtype, channels_last, sizes):
    problem = Problem(batch=2, channels_last=channels_last, **sizes)
    shape = (2, problem.out_channels, *problem.out_size)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = [
        run(deform_conv2d, problem.tensors(dtype, device), grad_output, **problem.arguments())
        for device in ("cuda", "cpu")
    ]
    for name, expected in results[1].items():
        assert results[0][name].device.type == "cuda"
        error = largest_error(results[0][name], expected)
        assert error <= 2 * TOLERANCE[dtype], f"{name}: error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_matches_reference(dtype, problem):
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("size", [1, 20_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", ONE_OF_EACH_RANK, ids=str)
def test_chunks_of_any_size_match_reference(chunks_of, dtype, problem, size):
    chunks_of(size)
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_tf32_matches_reference(tf32, problem):
    compare(problem, torch.float32, device="cuda", tolerance=1e-3)


@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("groups, deform_groups", [(1, 1), (2, 4), (2, 1)])
def test_gradcheck(has_mask, groups, deform_groups):
    problem = Problem(
        *(2, 4, (5, 4), 4, (2, 3), (2, 1), (1, 1), (1, 1)), groups, deform_groups, has_mask
    )
    tensors = problem.tensors(device="cuda")
    with torch.no_grad():  # Away from integer coordinates, where the derivative jumps.
        tensors["offset"].copy_(torch.rand_like(tensors["offset"]) * 0.8 + 0.1)
    names = [name for name, t in tensors.items() if t is not None]

    def call(*values):
        return deform_conv2d(**dict(zip(names, values)), **problem.arguments())

    # grad_input is added up in no fixed order.
    variables = [tensors[name] for name in names]
    assert torch.autograd.gradcheck(call, variables, nondet_tol=1e-12)


# ---------------------------------------------------------------------------- decided semantics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, 1e30, -1e30])
def test_offsets_that_reach_nothing(dtype, value):
    tensors = Problem(out_channels=3, float32_offset=True).tensors(dtype, "cuda")
    with torch.no_grad():
        tensors["offset"].fill_(value)
    assert_samples_nothing(deform_conv2d, tensors, padding=1)


def test_one_bad_offset_leaves_the_others_alone():
    tensors = Problem().tensors(device="cuda")
    with torch.no_grad():
        tensors["offset"][0, 3, 2, 2] = float("nan")
    actual = run(deform_conv2d, tensors, padding=1)
    expected = run(reference.deform_conv2d, exact(tensors), padding=1)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        assert largest_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype):
    tensors = Problem(batch=0).tensors(dtype, "cuda")
    results = run(deform_conv2d, tensors, padding=1)
    assert results["output"].shape == (0, 6, 7, 8)
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_kept(channels_last):
    tensors = Problem(channels_last=channels_last).tensors(torch.float16, "cuda")
    output = deform_conv2d(**tensors, padding=1)
    output.sum().backward()
    for tensor in (output, tensors["input"].grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() != channels_last


def test_arguments_need_not_be_contiguous():
    expected = run(deform_conv2d, Problem().tensors(device="cuda"), padding=1)
    tensors = {}
    for name, tensor in Problem().tensors(device="cuda").items():
        pairs = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)
        tensors[name] = pairs[..., 0].requires_grad_()
    actual = run(deform_conv2d, tensors, padding=1)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    problem = Problem(1, 40, (6, 5), 6)
    expected = run(deform_conv2d, problem.tensors(device="cuda"), padding=1)
    tensors = problem.tensors(device="cuda")
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    actual = run(deform_conv2d, tensors, padding=1)
    error = largest_error(actual[f"grad_{wanted}"], expected[f"grad_{wanted}"])
    assert error <= TOLERANCE[torch.float64]
    assert actual.keys() == {"output", f"grad_{wanted}"}


def test_input_of_more_than_2_31_elements():
    """The last channels of the last image are read, and their gradients written, where they lie."""
    channels, size = 4, 24_000  # 2.3e9 elements
    with needs_memory(40):
        x = torch.zeros(1, channels, size, size, dtype=torch.float16, device="cuda")
        x[0, -1, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda")
        x.requires_grad_()
        weight = torch.ones(1, channels, 1, 1, dtype=torch.float16, device="cuda")
        weight.requires_grad_()
        offset = torch.full((1, 2, 2, 2), -0.5, device="cuda", requires_grad=True)
        output = deform_conv2d(x, offset, weight, stride=size - 1)
        assert output[0, 0, 1, 1].item() == 2.5
        output.sum().backward()
        assert weight.grad.flatten().tolist() == [0, 0, 0, 2.5]
        assert offset.grad[0, :, 1, 1].tolist() == [2.0, 1.0]
        assert x.grad[0, -1, -2:, -2:].tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_output_of_more_than_2_31_elements():
    size = 46_400  # 2.15e9 output pixels, and twice as many offsets
    with needs_memory(64):
        x = torch.ones(1, 1, size, size, dtype=torch.float16, device="cuda")
        x[0, 0, -1, -1] = 3.0
        weight = torch.ones(1, 1, 1, 1, dtype=torch.float16, device="cuda")
        offset = torch.zeros(1, 2, size, size, device="cuda")
        offset[0, 1, -1, -2] = 0.5
        offset[0, 0, 0, 0] = float("nan")
        offset.requires_grad_()
        output = deform_conv2d(x, offset, weight)
        assert output[0, 0, 0, :2].tolist() == [0.0, 1.0]
        assert output[0, 0, -1, -3:].tolist() == [1.0, 2.0, 3.0]
        grad_output = torch.ones(1, 1, 1, 1, dtype=torch.float16, device="cuda")
        output.backward(grad_output.expand_as(output))
        assert offset.grad[0, 1, -1, -2].item() == 2.0
        assert offset.grad[0, :, 0, 0].tolist() == [0.0, 0.0]
