"""Bad calls of deformable convolution over any number of dimensions, and of what is compiled."""

import dataclasses
import re

import pytest
import torch

from tests.ops.problems import FUNCTIONS, LINE, VOLUME, Problem, compiled_arguments, detached

# What is changed in a good call of deform_conv2d, and what the error must name.
BAD_CALLS_2D = {
    "input of 3 dimensions": ({"input": torch.zeros(4, 7, 8)}, ValueError, r"input.*\(4, 7, 8\)"),
    "input of integers": (
        {"input": torch.zeros(2, 4, 7, 8, dtype=torch.int64)},
        TypeError,
        "input.*float32.*int64",
    ),
    "input is no tensor": ({"input": [1.0]}, TypeError, "input.*list"),
    "input without channels": ({"input": torch.zeros(2, 0, 7, 8)}, ValueError, "input.*channel"),
    "input too wide": (
        {"input": torch.zeros(2, 4, 7, 1).expand(-1, -1, -1, 2**30)},
        ValueError,
        r"input.*2\*\*30.*\(7, 1073741824\)",
    ),
    "padding too large": ({"padding": 2**30}, ValueError, r"padding.*2\*\*30.*2147483653"),
    "padding and dilation beyond counting": (
        {"padding": 2**40, "dilation": 2**40},
        ValueError,
        r"padding.*below 2\*\*31.*1099511627776",
    ),
    "dilation beyond counting": ({"dilation": (1, 2**63)}, ValueError, r"dilation.*below 2\*\*31"),
    "offset missing": ({"offset": None}, TypeError, "offset.*NoneType"),
    "offset of 16 channels": (
        {"offset": torch.zeros(2, 16, 7, 8)},
        ValueError,
        r"offset.*2 · 3 · 3.*16",
    ),
    "offset groups that do not divide": (
        {"offset": torch.zeros(2, 54, 7, 8)},
        ValueError,
        "offset.*54",
    ),
    "offset without channels": ({"offset": torch.zeros(2, 0, 7, 8)}, ValueError, "offset.*got 0"),
    "offset of another height": (
        {"offset": torch.zeros(2, 18, 6, 8)},
        ValueError,
        r"offset.*\(2, 18, 7, 8\).*\(2, 18, 6, 8\)",
    ),
    "offset of another batch": ({"offset": torch.zeros(1, 18, 7, 8)}, ValueError, "offset"),
    "offset of another dtype": (
        {"offset": torch.zeros(2, 18, 7, 8).double()},
        TypeError,
        "offset.*float32.*float64",
    ),
    "mask of 8 channels": ({"mask": torch.zeros(2, 8, 7, 8)}, ValueError, "mask.*9.*got 8"),
    "mask of another width": (
        {"mask": torch.zeros(2, 9, 7, 9)},
        ValueError,
        r"mask.*\(2, 9, 7, 8\).*\(2, 9, 7, 9\)",
    ),
    "mask of another dtype": (
        {"mask": torch.zeros(2, 9, 7, 8).half()},
        TypeError,
        "mask.*float32.*float16",
    ),
    "weight of 3 channels": ({"weight": torch.zeros(6, 3, 3, 3)}, ValueError, "weight.*4.*got 3"),
    "weight of 5 channels": ({"weight": torch.zeros(6, 5, 3, 3)}, ValueError, "weight.*4.*got 5"),
    "weight without taps": ({"weight": torch.zeros(6, 4, 0, 3)}, ValueError, "weight.*size 0"),
    "outputs that groups do not divide": (
        {"weight": torch.zeros(5, 2, 3, 3)},
        ValueError,
        "weight.*2 groups.*got 5",
    ),
    "weight of another dtype": (
        {"weight": torch.zeros(6, 4, 3, 3).half()},
        TypeError,
        "weight.*float32.*float16",
    ),
    "bias of 5": ({"bias": torch.zeros(5)}, ValueError, r"bias.*\(6,\).*\(5,\)"),
    "bias of 2 dimensions": ({"bias": torch.zeros(6, 1)}, ValueError, "bias.*1 dimension"),
    "bias of another dtype": ({"bias": torch.zeros(6).double()}, TypeError, "bias.*float64"),
    "stride 0": ({"stride": 0}, ValueError, "stride.*at least 1.*got 0"),
    "stride of a fraction": ({"stride": 1.5}, TypeError, "stride.*int.*1.5"),
    "three strides": ({"stride": (1, 1, 1)}, ValueError, r"stride.*\(1, 1, 1\)"),
    "dilation 0": ({"dilation": (1, 0)}, ValueError, r"dilation.*at least 1.*\(1, 0\)"),
    "negative padding": ({"padding": -1}, ValueError, "padding.*at least 0.*-1"),
    "padding by name": ({"padding": "same"}, TypeError, "padding.*'same'"),
    "kernel larger than input": (
        {"dilation": 9},
        ValueError,
        r"input.*\(19, 19\).*\(7, 8\)",
    ),
    "another device": (
        {"offset": torch.zeros(2, 18, 7, 8, device="meta")},
        ValueError,
        "offset.*cpu.*meta",
    ),
}


# What is changed in a good call of deform_conv3d, and what the error must name.
BAD_CALLS_3D = {
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


@pytest.mark.parametrize(
    ("problem", "case"),
    [(Problem(), case) for case in BAD_CALLS_2D] + [(VOLUME, case) for case in BAD_CALLS_3D],
    ids=[*BAD_CALLS_2D, *(f"{case} in 3d" for case in BAD_CALLS_3D)],
)
def test_bad_call_names_argument_expectation_and_value(problem, case):
    tensors = {n: t.detach() for n, t in problem.tensors(torch.float32).items()}
    arguments = {**tensors, **problem.arguments()}
    bad_calls = {2: BAD_CALLS_2D, 3: BAD_CALLS_3D}[problem.rank]
    changed, error, pattern = bad_calls[case]
    problem.function(**arguments)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        problem.function(**{**arguments, **changed})


def test_bad_calls_over_one_dimension():
    tensors = {n: t.detach() for n, t in LINE.tensors(torch.float32).items()}
    with pytest.raises(ValueError, match="input: expected 3 dimensions"):
        FUNCTIONS[1](**{**tensors, "input": torch.zeros(2, 4, 5, 6)})
    with pytest.raises(ValueError, match=r"offset.*1 · 3 · deform_groups.*got 4"):
        FUNCTIONS[1](**{**tensors, "offset": torch.zeros(2, 4, 9)}, padding=1)
    with pytest.raises(ValueError, match=r"stride: expected one number of at least 1.*\(1, 1\)"):
        FUNCTIONS[1](**tensors, stride=(1, 1), padding=1)


def test_problem_defaults_are_a_good_call():
    """The bad calls above each change one thing of a call that works."""
    problem = Problem()
    assert dataclasses.replace(problem, padding=(0, 0)).out_size == (5, 6)
    assert problem.out_size == (7, 8)


# --------------------------------------------------------------------------- the compiled operators


def test_deform_conv2d_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    x, offset, weight, bias, *geometry, mask = detached(
        compiled_arguments(Problem(), torch.float32)
    )
    op = torch.ops.mmdcn.deform_conv2d
    op(x, offset, weight, bias, *geometry, mask)
    for arguments in (
        (x, offset[:, :-1], weight, bias, *geometry, mask),
        (x, offset, weight[:, :3], bias, *geometry, mask),
        (x, offset, weight, bias[:-1], *geometry, mask),
        (x, offset, weight, bias, *geometry, mask[:, :-1]),
        (x, offset, weight, bias, *geometry, mask[:, :, :-1]),
        (x, offset.double(), weight, bias, *geometry, mask),
        (x[0], offset, weight, bias, *geometry, mask),
        (x[..., :1].expand(-1, -1, -1, 2**30), offset, weight, bias, *geometry, mask),
    ):
        with pytest.raises(RuntimeError, match="deform_conv2d"):
            op(*arguments)


def test_deform_conv_nd_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    good = detached(compiled_arguments(VOLUME, torch.float32))
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
def test_deform_conv_nd_refuses_other_ranks(rank):
    problem = Problem(2, 4, (3,) * rank, 6)
    arguments = compiled_arguments(problem, torch.float32)
    pattern = f"input: expected 5 dimensions, got {rank + 2}"
    with pytest.raises(RuntimeError, match=pattern):
        torch.ops.mmdcn.deform_conv_nd(*arguments)
    arguments = detached(arguments)
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
def test_deform_conv_nd_names_what_does_not_fit(name, bad):
    names = ("input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask")
    arguments = dict(zip(names, detached(compiled_arguments(VOLUME, torch.float32))))
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
def test_deform_conv_nd_refuses_numbers_that_give_another_size(place, number):
    """None of them overflows what sizes are computed in."""
    arguments = [*compiled_arguments(VOLUME, torch.float32)]
    arguments[place] = [1, 1, number]
    with pytest.raises(RuntimeError, match=r"offset\.size"):
        torch.ops.mmdcn.deform_conv_nd(*arguments)


def test_backward_refuses_what_is_not_the_gradient_of_the_output():
    x, offset, weight, _, *geometry, mask = detached(compiled_arguments(VOLUME, torch.float32))
    good = torch.zeros(2, 6, *VOLUME.out_size)
    op = torch.ops.mmdcn.deform_conv_nd_backward
    for name, grad_output, wanted in (
        ("grad_output", good[..., :-1], [True] * 4),
        ("grad_output", good.double(), [True] * 4),
        ("output_mask", good, [True] * 3),
    ):
        with pytest.raises(RuntimeError, match=name):
            op(grad_output, x, offset, weight, *geometry, mask, wanted)
