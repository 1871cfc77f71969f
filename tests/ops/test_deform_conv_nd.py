"""Deformable convolution over one and three dimensions: against the reference, torch's own
convolutions and gradcheck; its contract with torch; and bad calls."""

import dataclasses
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.library import opcheck

from mmdcn.ops import deform_conv2d, reference
from tests.ops.problems import (
    DTYPES,
    FUNCTIONS,
    LINE,
    LINE_VOLUME,
    NAMES,
    TOLERANCE,
    VOLUME,
    Problem,
    assert_samples_nothing,
    compare,
    exact,
    largest_error,
    problems,
    run,
    wide,
)

BOTH = pytest.mark.parametrize("problem", [LINE, VOLUME], ids=["1d", "3d"])


def call(problem: Problem, tensors: dict, grad_output=None) -> dict:
    return run(FUNCTIONS[problem.rank], tensors, grad_output, **problem.arguments())


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 2, (5,), 2, (3,), (2,), (1,), (1,), 1, 2),
        Problem(1, 2, (3, 2, 4), 2, (2, 1, 2), (1, 1, 2), (0, 1, 1), (1, 1, 2), 2, 2),
    ],
    ids=["1d", "3d"],
)
def test_reference_is_equations_2_to_4(problem):
    """The oracle itself, against sums over all integer positions q, written out with loops.

    Offset channels are ordered by group, tap and dimension, the outermost first.
    """
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    x, offset, weight, bias, mask = (tensors[name] for name in NAMES)
    actual = reference.deform_conv_nd(**tensors, **problem.arguments())
    grid = lambda sizes: itertools.product(*map(range, sizes))  # noqa: E731
    channels = problem.channels // problem.groups
    taps = len(list(grid(problem.kernel)))
    for out in range(problem.out_channels):
        first = out // (problem.out_channels // problem.groups) * channels
        for p0 in grid(problem.out_size):
            total = bias[out].clone()
            for c in range(channels):
                group = (first + c) // (problem.channels // problem.deform_groups)
                for n, pn in enumerate(grid(problem.kernel)):
                    sample = group * taps + n
                    p = [
                        p0[d] * problem.stride[d]
                        - problem.padding[d]
                        + pn[d] * problem.dilation[d]
                        + offset[(0, problem.rank * sample + d, *p0)]
                        for d in range(problem.rank)
                    ]
                    x_of_p = 0
                    for q in grid(problem.size):
                        g = 1
                        for q_d, p_d in zip(q, p):
                            g = g * max(0, 1 - abs(q_d - p_d))
                        x_of_p = x_of_p + g * x[(0, first + c, *q)]
                    total += weight[(out, c, *pn)] * x_of_p * mask[(0, sample, *p0)]
            torch.testing.assert_close(actual[(0, out, *p0)], total)


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


# ---------------------------------------------------------------------------- decided semantics


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, 1e30, -1e30])
def test_offsets_that_reach_nothing(dtype, value, problem):
    """Whatever the coordinate and the modulation, the sample is zero; so is every gradient."""
    tensors = dataclasses.replace(problem, float32_offset=True).tensors(dtype)
    with torch.no_grad():
        tensors["offset"].fill_(value)
        tensors["mask"].fill_(float("nan"))
    assert_samples_nothing(FUNCTIONS[problem.rank], tensors, **problem.arguments())


@BOTH
def test_one_bad_coordinate_leaves_the_others_alone(problem):
    for channel in range(problem.rank):
        tensors = problem.tensors()
        with torch.no_grad():
            tensors["offset"][0, channel].flatten()[3:4] = float("nan")
        actual = call(problem, tensors)
        expected = run(reference.deform_conv_nd, exact(tensors), **problem.arguments())
        for name, value in expected.items():
            assert torch.isfinite(actual[name]).all(), name
            assert largest_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(LINE, size=(0,), padding=(3,)),
        dataclasses.replace(VOLUME, size=(2, 0, 3), padding=(1, 3, 1)),
    ],
    ids=["1d", "3d"],
)
def test_input_without_positions(problem):
    """Where the padding alone is larger than the kernel, the output is the bias."""
    tensors = problem.tensors()
    results = call(problem, tensors)
    bias = tensors["bias"].view(-1, *[1] * problem.rank)
    assert torch.equal(results["output"], bias.expand(2, 6, *problem.out_size))
    assert torch.count_nonzero(results["grad_weight"]) == 0


@BOTH
def test_arguments_need_not_be_contiguous(problem):
    expected = call(problem, problem.tensors())
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
        actual = call(problem, tensors)
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (how, name)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    problem = dataclasses.replace(LINE, channels=80)
    expected = call(problem, problem.tensors())
    tensors = problem.tensors()
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    actual = call(problem, tensors)
    assert torch.equal(actual[f"grad_{wanted}"], expected[f"grad_{wanted}"])
    assert actual.keys() == {"output", f"grad_{wanted}"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(LINE, size=(3000,), channels=100, out_channels=40),
        dataclasses.replace(VOLUME, size=(7, 12, 13), channels=48, groups=2, deform_groups=3),
    ],
    ids=["1d", "3d"],
)
def test_same_bits_for_any_number_of_threads(problem, dtype):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(call(problem, problem.tensors(dtype)))
    torch.set_num_threads(2)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


# ------------------------------------------------------------------------------ contract with torch


def compiled_arguments(problem: Problem, dtype: torch.dtype) -> tuple:
    """What the compiled operator takes."""
    tensors = problem.tensors(dtype)
    offset, mask = (
        tensors[n].detach().to(wide(dtype)).requires_grad_() for n in ("offset", "mask")
    )
    geometry = (list(numbers) for numbers in problem.arguments().values())
    return tensors["input"], offset, tensors["weight"], tensors["bias"], *geometry, mask


@pytest.mark.parametrize("problem", [LINE_VOLUME, VOLUME], ids=["line", "volume"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype, problem):
    arguments = compiled_arguments(problem, dtype)
    opcheck(torch.ops.mmdcn.deform_conv_nd, arguments)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    del arguments[3]  # the bias
    grad_output = torch.randn(2, 6, *problem.out_size).to(dtype)
    for wanted in ([True] * 4, [False, True, False, False], [True, False, True, True]):
        opcheck(torch.ops.mmdcn.deform_conv_nd_backward, (grad_output, *arguments, wanted))


def test_compiled_operator_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    good = [
        a.detach() if isinstance(a, torch.Tensor) else a
        for a in compiled_arguments(VOLUME, torch.float32)
    ]
    x, offset, weight, bias, *_, mask = good
    op = torch.ops.mmdcn.deform_conv_nd
    op(*good)
    for place, bad in (
        (0, x[0]),
        (0, x[0, 0]),
        (0, x[:1]),
        (0, x[:, :3]),
        (0, x[..., :1].expand(-1, -1, -1, -1, 2**30)),
        (1, offset[:, :-1]),
        (1, offset.double()),
        (2, weight[:0]),
        (2, weight.double()),
        (3, bias[:-1]),
        (4, [1, 1]),
        (7, mask[..., :-1]),
        (7, mask[:, :-1]),
        (7, mask.double()),
    ):
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises(RuntimeError, match="deform_conv_nd"):
            op(*arguments)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_compiled_operator_refuses_other_ranks(rank):
    problem = Problem(2, 4, (3,) * rank, 6)
    arguments = compiled_arguments(problem, torch.float32)
    pattern = f"input: expected 5 dimensions, got {rank + 2}"
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_conv_nd(*arguments)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    del arguments[3]  # the bias
    grad_output = torch.zeros(2, 6, *problem.out_size)
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_conv_nd_backward(grad_output, *arguments, [True] * 4)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("offset", lambda t: t[..., :-1]),
        ("offset", lambda t: t.unsqueeze(0)),
        ("weight", lambda t: t[:, :, :0]),
        ("weight", lambda t: t[:, :3]),
        ("stride", lambda _: [1, 1, 0]),
        ("stride", lambda _: [1, -1, 1]),
        ("padding", lambda _: [1, 1, -1]),
        ("offset", lambda t: t[:, :, :, :0]),
        ("dilation", lambda _: [0, 1, 1]),
        ("dilation", lambda _: [1, 1]),
        ("mask", lambda t: t[..., :1]),
    ],
)
def test_compiled_operator_names_what_does_not_fit(name, bad):
    names = ("input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask")
    arguments = {
        n: a.detach() if isinstance(a, torch.Tensor) else a
        for n, a in zip(names, compiled_arguments(VOLUME, torch.float32))
    }
    arguments[name] = bad(arguments[name])
    pattern = rf"mmdcn::deform_conv_nd: expected .*{name}"
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_conv_nd(*arguments.values())
    del arguments["bias"]
    grad_output = torch.zeros(2, 6, *VOLUME.out_size)
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_conv_nd_backward(grad_output, *arguments.values(), [True] * 4)


@pytest.mark.parametrize("place", [4, 5, 6], ids=["stride", "padding", "dilation"])
@pytest.mark.parametrize("number", [2, 2**31, 2**40, 2**62, 2**63 - 1])
def test_compiled_operator_refuses_numbers_that_give_another_size(place, number):
    """None of them overflows what sizes are computed in."""
    arguments = [*compiled_arguments(VOLUME, torch.float32)]
    arguments[place] = [1, 1, number]
    with pytest.raises(RuntimeError, match=r"offset\.size"):
        torch.ops.mmdcn.deform_conv_nd(*arguments)


def test_compiled_backward_refuses_what_is_not_the_gradient_of_the_output():
    x, offset, weight, _, *geometry, mask = (
        a.detach() if isinstance(a, torch.Tensor) else a
        for a in compiled_arguments(VOLUME, torch.float32)
    )
    good = torch.zeros(2, 6, *VOLUME.out_size)
    op = torch.ops.mmdcn.deform_conv_nd_backward
    for name, grad_output, wanted in (
        ("grad_output", good[..., :-1], [True] * 4),
        ("grad_output", good.double(), [True] * 4),
        ("output_mask", good, [True] * 3),
    ):
        with pytest.raises(RuntimeError, match=name):
            op(grad_output, x, offset, weight, *geometry, mask, wanted)


# ------------------------------------------------------------------------------------- bad calls

# What is changed in a good call of deform_conv3d, and what the error must name.
BAD_CALLS = {
    "input of an image": ({"input": torch.zeros(2, 4, 5, 6)}, ValueError, r"input.*5 dim.*\(2, 4"),
    "input of integers": (
        {"input": torch.zeros(2, 4, 4, 5, 6, dtype=torch.int64)},
        TypeError,
        "input.*float32.*int64",
    ),
    "input too long": (
        {"input": torch.zeros(2, 4, 4, 5, 1).expand(-1, -1, -1, -1, 2**30)},
        ValueError,
        r"input.*depth.*height.*width below 2\*\*30",
    ),
    "input too small": (
        {"input": torch.zeros(2, 4, 4, 5, 6), "dilation": 4},
        ValueError,
        r"input.*depth, height and width.*\(9, 9, 9\).*\(1, 1, 1\).*\(4, 5, 6\)",
    ),
    "offset of two dimensions": (
        {"offset": torch.zeros(2, 54, 4, 5, 6)},
        ValueError,
        r"offset.*3 · 3 · 3 · 3.*81 for one group.*got 54",
    ),
    "offset of another depth": (
        {"offset": torch.zeros(2, 81, 3, 5, 6)},
        ValueError,
        r"offset.*\(2, 81, 4, 5, 6\).*\(2, 81, 3, 5, 6\)",
    ),
    "offset of another dtype": (
        {"offset": torch.zeros(2, 81, 4, 5, 6).double()},
        TypeError,
        "offset.*float32.*float64",
    ),
    "weight of other channels": (
        {"weight": torch.zeros(6, 3, 3, 3, 3)},
        ValueError,
        "weight.*must divide the 4 channels.*got 3",
    ),
    "weight missing": ({"weight": None}, TypeError, "weight.*NoneType"),
    "bias of 5": ({"bias": torch.zeros(5)}, ValueError, r"bias.*\(6,\).*\(5,\)"),
    "mask of 81 channels": (
        {"mask": torch.zeros(2, 81, 4, 5, 6)},
        ValueError,
        "mask.*27, 3 · 3 · 3.*got 81",
    ),
    "mask elsewhere": (
        {"mask": torch.zeros(2, 27, 4, 5, 6, device="meta")},
        ValueError,
        "mask.*cpu.*meta",
    ),
    "stride of two": ({"stride": (1, 1)}, ValueError, r"stride.*one or three.*\(1, 1\)"),
    "stride of none": ({"stride": 0}, ValueError, "stride.*at least 1.*0"),
    "stride of a half": ({"stride": 0.5}, TypeError, "stride.*three ints.*0.5"),
    "padding below": ({"padding": (0, -1, 0)}, ValueError, "padding.*at least 0.*-1"),
    "dilation of none": ({"dilation": (1, 0, 1)}, ValueError, "dilation.*at least 1"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_names_argument_expectation_and_value(case):
    tensors = {n: t.detach() for n, t in VOLUME.tensors(torch.float32).items()}
    arguments = {**tensors, **VOLUME.arguments()}
    changed, error, pattern = BAD_CALLS[case]
    FUNCTIONS[3](**arguments)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        FUNCTIONS[3](**{**arguments, **changed})


def test_bad_calls_over_one_dimension():
    tensors = {n: t.detach() for n, t in LINE.tensors(torch.float32).items()}
    with pytest.raises(ValueError, match="input: expected 3 dimensions"):
        FUNCTIONS[1](**{**tensors, "input": torch.zeros(2, 4, 5, 6)})
    with pytest.raises(ValueError, match=r"offset.*1 · 3 · deform_groups.*got 4"):
        FUNCTIONS[1](**{**tensors, "offset": torch.zeros(2, 4, 9)}, padding=1)
    with pytest.raises(ValueError, match=r"stride: expected one number of at least 1.*\(1, 1\)"):
        FUNCTIONS[1](**tensors, stride=(1, 1), padding=1)
