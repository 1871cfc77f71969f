"""DCNv3 and DCNv4 against the reference, gradcheck, their contract with torch, and bad calls."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.library import opcheck

from mmdcn.ops import dcnv3, dcnv4, reference
from tests.ops.aggregate_problems import (
    AggregateProblem,
    aggregate_problems,
    assert_any_strides_of_size_one,
)
from tests.ops.problems import (
    DTYPES,
    TOLERANCE,
    assert_gradient_alone,
    assert_same_bits,
    compare,
    detached,
    exact,
    largest_error,
    run,
    wide,
)

NAMES = ("input", "offset", "mask")


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_coordinate_that_rounds_to_zero_lies_below_it(dtype):
    """-1e-17 plus 1 is 1: the sample is between pixels -1 and 0, whose difference is its slope."""
    one = torch.ones(1, 1, 1, 1, dtype=dtype)
    offset = torch.full((1, 1, 1, 2), -1e-17, dtype=dtype, requires_grad=True)
    output = dcnv3(3 * one, offset, one, kernel_size=1)
    output.sum().backward()
    assert torch.equal(output.detach(), 3 * one)
    assert torch.equal(offset.grad, torch.full_like(offset, 3.0))


@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=aggregate_problems())
def test_matches_reference(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Groups of several parts whose gradients are added up.
        AggregateProblem(channels=600, group=1),
        AggregateProblem(channels=144, group=2),
        # Several pixels to a batch of samples, one, and so many taps that one has several batches.
        AggregateProblem(kernel=(5, 7), padding=(2, 3)),
        AggregateProblem(kernel=(11, 9), padding=(5, 4), channels=9, group=1),
        AggregateProblem(kernel=(15, 15), padding=(7, 7), spread=9.0, remove_center=True),
        AggregateProblem(kernel=(7, 7), padding=(3, 3), remove_center=True, channels=34),
    ],
    ids=str,
)
def test_matches_reference_across_blocks(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Samples that stay, that reach into the other strip, and that reach everywhere.
        AggregateProblem(size=(17, 5), batch=1, spread=0.1),
        AggregateProblem(size=(33, 4), batch=1, channels=40, group=4),
        AggregateProblem(size=(16, 9), batch=1, channels=20, group=1, spread=20.0),
        # Four strips, of a single image, and two of each of several.
        AggregateProblem(size=(35, 6), batch=1, channels=20, group=1, spread=5.0),
        AggregateProblem(size=(17, 6), batch=2, channels=20, group=1, spread=5.0),
        AggregateProblem(size=(26, 5), batch=3, channels=9, group=1, spread=20.0),
        # Several blocks of channels to a group, and several batches of samples to a pixel.
        AggregateProblem(size=(18, 6), batch=1, channels=600, group=1, spread=5.0),
        AggregateProblem(size=(16, 7), batch=1, kernel=15, padding=7, spread=5.0),
        # Two output rows, a single one, and a single pixel, of which a strip has none.
        AggregateProblem(size=(20, 5), batch=1, stride=(12, 1), spread=9.0),
        AggregateProblem(size=(20, 5), batch=1, stride=(30, 1), spread=9.0),
        AggregateProblem(size=(20, 5), batch=1, stride=30, spread=9.0),
    ],
    ids=str,
)
def test_matches_reference_across_strips(dtype, problem, deterministic):
    # Memory that nobody has set is full of NaN then.
    assert torch.utils.deterministic.fill_uninitialized_memory
    compare(problem, dtype)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_v4_matches_reference(dtype, remove_center, padded):
    problem = AggregateProblem(channels=12, group=3, remove_center=remove_center)
    tensors = problem.packed(dtype, padded)
    actual = run(dcnv4, tensors, **problem.arguments())
    expected = run(reference.dcnv4, exact(problem.packed(dtype)), **problem.arguments())
    for name, value in expected.items():
        result = actual[name]
        if name == "grad_offset_mask":
            assert torch.count_nonzero(result[..., value.shape[3] :]) == 0
            result = result[..., : value.shape[3]]
        assert largest_error(result, value) <= TOLERANCE[dtype], name
    split = problem.tensors(dtype)
    assert torch.equal(actual["output"], dcnv3(**split, **problem.arguments()))


def test_regular_grid_is_average_pooling():
    problem = AggregateProblem(kernel=(3, 5), stride=(2, 1), padding=(1, 2))
    tensors = problem.tensors()
    x = tensors["input"]
    output = dcnv3(
        x,
        torch.zeros_like(tensors["offset"]),
        torch.full_like(tensors["mask"], 1 / 15),
        **problem.arguments(),
    )
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), (3, 5), (2, 1), (1, 2))
    torch.testing.assert_close(output, expected.permute(0, 2, 3, 1))


def test_one_tap_per_channel_is_a_depthwise_convolution():
    """Modulations that are the same everywhere are the weights of a depth-wise kernel."""
    problem = AggregateProblem(channels=3, group=3, kernel=(3, 2), dilation=(2, 3))
    tensors = problem.tensors()
    x, weight = tensors["input"], torch.randn(3, 3, 2, dtype=torch.float64)
    columns = weight.transpose(1, 2).reshape(-1)
    output = dcnv3(
        x,
        torch.zeros_like(tensors["offset"]),
        columns.expand_as(tensors["mask"]),
        **problem.arguments(),
    )
    expected = F.conv2d(
        x.permute(0, 3, 1, 2), weight.unsqueeze(1), None, 1, (1, 1), (2, 3), groups=3
    )
    torch.testing.assert_close(output, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("remove_center", [False, True])
def test_gradcheck(remove_center):
    problem = AggregateProblem(
        1, 4, (4, 3), (3, 3), (2, 1), (1, 1), (1, 1), 2, 0.5, remove_center=remove_center
    )
    tensors = problem.tensors()
    with torch.no_grad():  # Away from integer coordinates, where the derivative jumps.
        tensors["offset"].copy_(2 * torch.rand_like(tensors["offset"]) * 0.4 + 0.1)

    def call(*values):
        return dcnv3(*values, **problem.arguments())

    variables = [tensors[name] for name in NAMES]
    assert torch.autograd.gradcheck(call, variables)
    assert torch.autograd.gradgradcheck(call, variables, fast_mode=True)


# ---------------------------------------------------------------------------- decided semantics


def test_one_bad_offset_leaves_the_others_alone():
    problem = AggregateProblem()
    tensors = problem.tensors()
    with torch.no_grad():
        tensors["offset"][0, 2, 2, 5] = float("nan")
    actual = run(dcnv3, tensors, **problem.arguments())
    expected = run(reference.dcnv3, exact(tensors), **problem.arguments())
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        assert largest_error(actual[name], value) < 1e-12, name


def test_arguments_need_not_be_contiguous():
    problem = AggregateProblem()
    expected = run(dcnv3, problem.tensors(), **problem.arguments())
    views = {
        "last": lambda t: torch.stack([t, t * 0 + 9], dim=-1)[..., 0],
        "images first": lambda t: t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        "wide": lambda t: torch.cat([t, t * 0 + 9], dim=2)[:, :, : t.shape[2]],
        "channels": lambda t: torch.cat([t, t * 0 + 9], dim=3)[..., : t.shape[3]],
        "batch": lambda t: torch.stack([t, t * 0 + 9], dim=1)[:, 0],
    }
    for how, view in views.items():
        tensors = {name: view(t.detach()).requires_grad_() for name, t in problem.tensors().items()}
        actual = run(dcnv3, tensors, **problem.arguments())
        for name, value in expected.items():
            assert torch.equal(actual[name], value), (how, name)


@pytest.mark.parametrize("size", itertools.product((1, 3), repeat=3), ids=str)
def test_dimensions_of_size_one_may_have_any_stride(size):
    assert_any_strides_of_size_one(torch.ops.mmdcn, *size)


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("channels", [8, 160])
def test_each_gradient_alone(wanted, channels):
    assert_gradient_alone(AggregateProblem(channels=channels), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        AggregateProblem(channels=64, group=4, size=(40, 41)),
        AggregateProblem(channels=200, group=1, size=(30, 31)),
        AggregateProblem(channels=64, group=4, size=(40, 41), batch=1),
        AggregateProblem(channels=300, group=1, size=(30, 31), batch=1, spread=9.0),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(problem, dtype):
    assert_same_bits(problem, dtype)


# ------------------------------------------------------------------------------ contract with torch


def compiled_arguments(dtype: torch.dtype) -> tuple:
    """What the compiled operator takes."""
    x, offset, mask = AggregateProblem().tensors(dtype).values()
    offset, mask = (
        t.detach().to(wide(dtype)).unflatten(3, (2, -1)).contiguous().requires_grad_()
        for t in (offset, mask)
    )
    return x, offset, mask, [3, 3], [1, 1], [1, 1], [1, 1], 1.0, False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    arguments = compiled_arguments(dtype)
    opcheck(torch.ops.mmdcn.deform_aggregate, arguments)
    arguments = detached(arguments)
    grad_output = torch.randn(2, 7, 8, 8).to(dtype)
    for wanted in ([True] * 3, [True, False, False], [False, True, True], [False, False, True]):
        opcheck(torch.ops.mmdcn.deform_aggregate_backward, (grad_output, *arguments, wanted))


def test_compiled_operator_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    good = list(compiled_arguments(torch.float32))
    x, offset, mask = (t.detach() for t in good[:3])
    op = torch.ops.mmdcn.deform_aggregate
    op(*good)
    for place, bad in (
        (0, x[0]),
        (0, x[..., :7]),
        (0, x[:, :, :1].expand(-1, -1, 2**30, -1)),
        (1, offset[:1]),
        (1, offset[..., :-1]),
        (1, offset.double()),
        (2, mask[:, :-1]),
        (2, mask[:, :, :, :1]),
        (2, mask[..., :-1]),
        (2, mask.double()),
        (3, [3, 4]),
        (8, True),
    ):
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises(RuntimeError, match="deform_aggregate"):
            op(*arguments)


@pytest.mark.parametrize(
    ("place", "bad", "named"),
    [
        (1, lambda t: t[:, :-1], "offset"),
        (2, lambda t: t[:, :, :0], "mask"),
        (3, lambda _: [0, 3], "kernel_size"),
        (3, lambda _: [2**40, 3], "kernel_size"),
        (4, lambda _: [1, 0], "stride"),
        (4, lambda _: [2, 1], "offset"),
        (4, lambda _: [2**62, 2**62], "offset"),
        (5, lambda _: [-1, 1], "padding"),
        (5, lambda _: [2, 1], "offset"),
        (5, lambda _: [2**63 - 1, 1], "offset"),
        (6, lambda _: [1, 0], "dilation"),
        (6, lambda _: [2**62, 1], "offset"),
    ],
)
def test_compiled_operator_names_what_does_not_fit(place, bad, named):
    arguments = detached(compiled_arguments(torch.float32))
    arguments[place] = bad(arguments[place])
    pattern = rf"mmdcn::deform_aggregate: expected .*{named}"
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_aggregate(*arguments)
    grad_output = torch.zeros(2, 7, 8, 8)
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_aggregate_backward(grad_output, *arguments, [True] * 3)


def test_compiled_operator_refuses_an_even_kernel_without_center():
    x, offset, mask, *geometry = compiled_arguments(torch.float32)
    geometry[0], geometry[-1] = [2, 2], True
    offset, mask = offset[..., :6], mask[..., :3]
    with pytest.raises(RuntimeError, match="remove_center"):
        torch.ops.mmdcn.deform_aggregate(x, offset, mask, *geometry)


# ------------------------------------------------------------------------------------- bad calls

# What is changed in a good call, and what the error must name.
BAD_CALLS = {
    "input of 3 dimensions": ({"input": torch.zeros(7, 8, 8)}, ValueError, r"input.*\(7, 8, 8\)"),
    "input of integers": (
        {"input": torch.zeros(2, 7, 8, 8, dtype=torch.int64)},
        TypeError,
        "input.*float32.*int64",
    ),
    "input without channels": ({"input": torch.zeros(2, 7, 8, 0)}, ValueError, "input.*channel"),
    "input too wide": (
        {"input": torch.zeros(2, 7, 1, 8).expand(-1, -1, 2**30, -1)},
        ValueError,
        r"input.*2\*\*30",
    ),
    "offset missing": ({"offset": None}, TypeError, "offset.*NoneType"),
    "offset of another width": (
        {"offset": torch.zeros(2, 7, 7, 36)},
        ValueError,
        r"offset.*\(2, 7, 8, 36\).*\(2, 7, 7, 36\)",
    ),
    "offset of 34 channels": (
        {"offset": torch.zeros(2, 7, 8, 34)},
        ValueError,
        "offset.*36 channels.*18 for each of 2 groups.*got 34",
    ),
    "offset of another dtype": (
        {"offset": torch.zeros(2, 7, 8, 36).double()},
        TypeError,
        "offset.*float32.*float64",
    ),
    "mask of 9 channels": ({"mask": torch.zeros(2, 7, 8, 9)}, ValueError, "mask.*18.*got 9"),
    "mask of another batch": ({"mask": torch.zeros(1, 7, 8, 18)}, ValueError, "mask.*shape"),
    "mask elsewhere": (
        {"mask": torch.zeros(2, 7, 8, 18, device="meta")},
        ValueError,
        "mask.*cpu.*meta",
    ),
    "groups that do not divide": ({"group": 3}, ValueError, "group.*8 channels.*got 3"),
    "no groups": ({"group": 0}, ValueError, "group.*got 0"),
    "kernel of zero": ({"kernel_size": 0}, ValueError, "kernel_size.*at least 1.*got 0"),
    "stride 0": ({"stride": 0}, ValueError, "stride.*at least 1.*got 0"),
    "negative padding": ({"padding": -1}, ValueError, "padding.*at least 0.*-1"),
    "padding too large": ({"padding": 2**30}, ValueError, r"padding.*2\*\*30"),
    "dilation of a fraction": ({"dilation": 0.5}, TypeError, "dilation.*int.*0.5"),
    "kernel larger than input": ({"dilation": 9}, ValueError, r"input.*\(19, 19\).*\(7, 8\)"),
    "scale by name": ({"offset_scale": "2"}, TypeError, "offset_scale.*number.*'2'"),
    "scale of infinity": ({"offset_scale": float("inf")}, ValueError, "offset_scale.*finite"),
    "no middle": (
        {"kernel_size": (3, 2), "remove_center": True},
        ValueError,
        r"kernel_size.*odd.*\(3, 2\)",
    ),
    "nothing but the middle": (
        {"kernel_size": 1, "remove_center": True},
        ValueError,
        "kernel_size.*more than one tap",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_names_argument_expectation_and_value(case):
    problem = AggregateProblem()
    tensors = {n: t.detach() for n, t in problem.tensors(torch.float32).items()}
    arguments = {**tensors, **problem.arguments()}
    changed, error, pattern = BAD_CALLS[case]
    dcnv3(**arguments)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        dcnv3(**{**arguments, **changed})


@pytest.mark.parametrize("channels", [53, 55, 57, 64])
def test_v4_refuses_other_channels(channels):
    problem = AggregateProblem()
    x = torch.zeros(2, 7, 8, 8)
    for good in (54, 56):
        dcnv4(x, torch.zeros(2, 7, 8, good), **problem.arguments())
    message = f"offset_mask: expected 54 channels.*, or 56 with padding, got {channels}"
    with pytest.raises(ValueError, match=message):
        dcnv4(x, torch.zeros(2, 7, 8, channels), **problem.arguments())
