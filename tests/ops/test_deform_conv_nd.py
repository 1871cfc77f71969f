"""Deformable convolution over one and three dimensions: against the reference, the operator over
two, torch's own convolutions and gradcheck; and its contract with torch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.library import opcheck

from mmdcn.ops import deform_conv2d
from tests.ops.problems import (
    DTYPES,
    FUNCTIONS,
    LINE,
    LINE_VOLUME,
    NAMES,
    TOLERANCE,
    VOLUME,
    Problem,
    compare,
    compiled_arguments,
    detached,
    exact,
    largest_error,
    problems,
    run,
    wide,
)

BOTH = pytest.mark.parametrize("problem", [LINE, VOLUME], ids=["1d", "3d"])


@settings(max_examples=20)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems(ranks=(1, 3)))
def test_matches_reference(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Offset groups of several parts of channels, and parts of several groups of either kind.
        dataclasses.replace(LINE, size=(150,), channels=150, out_channels=70),
        dataclasses.replace(LINE, size=(120,), channels=96, out_channels=96, deform_groups=4),
        dataclasses.replace(VOLUME, channels=66, out_channels=66, groups=66, deform_groups=2),
        Problem(1, 40, (2, 3, 4), 8, groups=2, deform_groups=40),
        # Columns that are larger than a tile should be.
        Problem(1, 260, (3, 4, 4), 3, (3, 3, 3), deform_groups=5),
    ],
    ids=str,
)
def test_matches_reference_across_parts(dtype, problem):
    compare(problem, dtype)


@settings(max_examples=15)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@given(problem=problems(ranks=(1, 2)))
def test_fewer_dimensions_match_their_own_operator(dtype, problem):
    """Lines and images as volumes of size one, against the kernels tuned for two dimensions."""
    more = 3 - problem.rank

    def as_volume(tensor):
        return tensor.reshape(*tensor.shape[:2], *[1] * more, *tensor.shape[2:])

    def over_volumes(input, offset, weight, bias, mask, stride, padding, dilation):
        offset, mask = (None if t is None else t.to(wide(dtype)) for t in (offset, mask))
        # Samples do not move along the new dimensions, which come first.
        moves = offset.unflatten(1, (-1, problem.rank))
        still = torch.zeros_like(moves[:, :, :1]).expand(-1, -1, more, *[-1] * problem.rank)
        offset = as_volume(torch.cat([still, moves], 2).flatten(1, 2))
        mask = None if mask is None else as_volume(mask)
        stride, padding, dilation = (
            [new] * more + list(numbers)
            for new, numbers in ((1, stride), (0, padding), (1, dilation))
        )
        output = torch.ops.mmdcn.deform_conv_nd(
            as_volume(input), offset, as_volume(weight), bias, stride, padding, dilation, mask
        )
        return output.flatten(2, 2 + more)

    actual = run(over_volumes, problem.tensors(dtype), **problem.arguments())
    function = FUNCTIONS[problem.rank]
    expected = run(function, problem.tensors(dtype), **problem.arguments())
    for name, value in expected.items():
        if value is not None:
            assert largest_error(actual[name], value) <= 2 * TOLERANCE[dtype], name


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regular_grid_is_plain_convolution(dtype, problem):
    problem = dataclasses.replace(problem, channels=6, groups=3, deform_groups=2)
    tensors = problem.tensors(dtype)
    del tensors["mask"]
    offset = torch.zeros_like(tensors.pop("offset"))
    output = FUNCTIONS[problem.rank](offset=offset, **tensors, **problem.arguments())
    convolution = {1: F.conv1d, 3: F.conv3d}[problem.rank]
    expected = convolution(*exact(tensors).values(), **problem.arguments(), groups=3)
    assert largest_error(output.detach(), expected.detach()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("deform_groups", [1, 2])
def test_a_volume_of_one_layer_is_an_image(deform_groups):
    """Offsets within the layer, z being 0, do what they do in two dimensions."""
    problem = Problem(
        size=(1, 6, 7), kernel=(1, 3, 3), padding=(0, 1, 1), deform_groups=deform_groups
    )
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    offset = tensors["offset"].unflatten(1, (-1, 3))
    offset[:, :, 0] = 0
    volume = FUNCTIONS[3](**tensors, **problem.arguments())
    flat = {name: t.squeeze(2) for name, t in tensors.items() if name != "bias"}
    flat["offset"] = offset[:, :, 1:].flatten(1, 2).squeeze(2)
    image = deform_conv2d(**flat, bias=tensors["bias"], padding=1)
    torch.testing.assert_close(volume.squeeze(2), image)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 2, (4,), 2, (3,), (1,), (1,), (1,), 1, 2),
        Problem(1, 2, (2, 3, 2), 2, (2, 1, 2), (1, 2, 1), (1, 1, 0), (1, 1, 1), 2, 1),
    ],
    ids=["1d", "3d"],
)
def test_gradcheck(problem):
    tensors = problem.tensors()
    with torch.no_grad():  # Away from integer coordinates, where the derivative jumps.
        tensors["offset"].copy_(torch.rand_like(tensors["offset"]) * 0.8 + 0.1)

    def function(*values):
        return FUNCTIONS[problem.rank](**dict(zip(NAMES, values)), **problem.arguments())

    variables = [tensors[name] for name in NAMES]
    assert torch.autograd.gradcheck(function, variables)
    assert torch.autograd.gradgradcheck(function, variables, fast_mode=True)


@BOTH
def test_arguments_need_not_be_contiguous(problem):
    expected = run(problem.function, problem.tensors(), **problem.arguments())
    views = {
        "last": lambda t: torch.stack([t, t * 0 + 9], dim=-1)[..., 0],
        "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
        "batch": lambda t: torch.stack([t, t * 0 + 9], dim=1)[:, 0],
    }
    for how, view in views.items():
        tensors = {
            name: (t if name == "bias" else view(t)).detach().requires_grad_()
            for name, t in problem.tensors().items()
        }
        actual = run(problem.function, tensors, **problem.arguments())
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (how, name)


@pytest.mark.parametrize("problem", [LINE_VOLUME, VOLUME], ids=["line", "volume"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, problem):
    arguments = compiled_arguments(problem, dtype)
    opcheck(torch.ops.mmdcn.deform_conv_nd, arguments)
    arguments = detached(arguments)
    del arguments[3]  # the bias
    grad_output = torch.randn(2, 6, *problem.out_size).to(dtype)
    for wanted in ([True] * 4, [False, True, False, False], [True, False, True, True]):
        opcheck(torch.ops.mmdcn.deform_conv_nd_backward, (grad_output, *arguments, wanted))
