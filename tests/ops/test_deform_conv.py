"""The operator against the reference, gradcheck, mmcv, its contract with torch, and bad calls."""

import dataclasses
import gc
import os
import re
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.library import opcheck

from mmdcn.ops import _devices, deform_conv2d, reference
from tests.ops.problems import (
    DTYPES,
    NAMES,
    Problem,
    assert_samples_nothing,
    compare,
    exact,
    largest_error,
    problems,
    run,
    wide,
)

# ------------------------------------------------------------------------------- the mathematics


def test_reference_is_equations_2_to_4():
    """The oracle itself, against sums over all integer positions q, written out with loops."""
    problem = Problem(1, 2, (4, 5), 2, (2, 3), (2, 1), (1, 1), (1, 2), 1, 2)
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    x, offset, weight, bias, mask = (tensors[name] for name in NAMES)
    actual = reference.deform_conv2d(**tensors, **problem.arguments())
    for o in range(2):
        for y0 in range(problem.out_size[0]):
            for x0 in range(problem.out_size[1]):
                total = bias[o]
                for c in range(2):
                    for n in range(6):
                        i, j = divmod(n, 3)
                        p_y = y0 * 2 - 1 + i * 1 + offset[0, 12 * c + 2 * n, y0, x0]
                        p_x = x0 * 1 - 1 + j * 2 + offset[0, 12 * c + 2 * n + 1, y0, x0]
                        x_of_p = sum(
                            max(0, 1 - abs(q_y - p_y))
                            * max(0, 1 - abs(q_x - p_x))
                            * x[0, c, q_y, q_x]
                            for q_y in range(4)
                            for q_x in range(5)
                        )
                        total = total + weight[o, c, i, j] * x_of_p * mask[0, 6 * c + n, y0, x0]
                torch.testing.assert_close(actual[0, o, y0, x0], total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
def test_matches_reference(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize(
    "problem",
    [
        # Two blocks of channels share an offset group, over more than one span of pixels.
        Problem(1, 130, (48, 50), 5, channels_last=True),
        # Blocks that end in the middle of an offset group.
        Problem(2, 96, (12, 11), 8, deform_groups=2),
        # Offset groups of an odd number of channels, where bfloat16 is multiplied in pairs; taps
        # that are multiplied in several parts, of different sizes.
        Problem(1, 15, (12, 11), 8, deform_groups=3, weight_channels_last=True),
        Problem(1, 105, (9, 8), 4, kernel=(5, 3), padding=(2, 1), points_channels_last=True),
        # Groups and offset groups that do not divide each other; an offset group per channel.
        Problem(1, 12, (7, 8), 6, groups=2, deform_groups=3),
        Problem(1, 12, (7, 8), 24, groups=4, deform_groups=6, spread=20.0),
        Problem(1, 24, (7, 8), 24, groups=24, deform_groups=24),
        # Few channels to an offset group: more than a span of tiles, and more groups than are
        # sampled together.
        Problem(1, 70, (30, 31), 4, groups=2, deform_groups=70, points_channels_last=True),
        Problem(2, 70, (30, 31), 4, groups=2, deform_groups=35, channels_last=True),
        Problem(1, 7, (20, 3), 9, kernel=(7, 1), padding=(3, 0)),
        # Weights so large that each block's are packed anew for each span and each image.
        Problem(1, 350, (48, 40), 350, channels_last=True),
        Problem(2, 350, (6, 7), 700, groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_across_blocks(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize(
    "problem",
    [
        # The window rolls down the image; samples lie inside it, and far outside.
        Problem(2, 20, (70, 9), 5, spread=1.0),
        Problem(2, 20, (70, 9), 5, spread=25.0),
        Problem(1, 20, (70, 9), 5, stride=(3, 2), dilation=(4, 2), deform_groups=2, spread=9.0),
        # Wide images are worked through in several strips.
        Problem(1, 64, (24, 450), 3, spread=6.0),
        Problem(2, 64, (24, 451), 3, stride=(2, 1), spread=40.0, points_channels_last=True),
        # So many channels that the window shows little more than the grid itself.
        Problem(1, 1100, (30, 40), 2, groups=2, spread=3.0),
        # So many output channels to so few pixels that each thread has its own of them.
        Problem(2, 100, (12, 9), 256, spread=6.0),
        Problem(2, 100, (12, 9), 256, channels_last=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_through_windows(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("groups, deform_groups", [(1, 1), (2, 4), (2, 1)])
def test_gradcheck(has_mask, groups, deform_groups):
    problem = Problem(
        1, 4, (4, 3), 4, (2, 3), (2, 1), (1, 1), (1, 1), groups, deform_groups, has_mask
    )
    tensors = problem.tensors()
    with torch.no_grad():  # Away from integer coordinates, where the derivative jumps.
        tensors["offset"].copy_(torch.rand_like(tensors["offset"]) * 0.8 + 0.1)
    variables = [t for t in tensors.values() if t is not None]
    names = [name for name, t in tensors.items() if t is not None]

    def call(*values):
        return deform_conv2d(**dict(zip(names, values)), **problem.arguments())

    assert torch.autograd.gradcheck(call, variables)
    assert torch.autograd.gradgradcheck(call, variables, fast_mode=True)


def test_zero_offset_is_convolution():
    problem = Problem(2, 6, (9, 8), 4, (3, 3), (2, 1), (1, 2), (1, 2), groups=2, has_mask=False)
    tensors = problem.tensors()
    tensors["offset"] = torch.zeros_like(tensors["offset"])
    tensors["mask"] = None
    expected = F.conv2d(
        tensors["input"], tensors["weight"], tensors["bias"], **problem.arguments(), groups=2
    )
    torch.testing.assert_close(deform_conv2d(**tensors, **problem.arguments()), expected)


# ---------------------------------------------------------------------------- decided semantics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 1e30, -1e30]
)
def test_offsets_that_reach_nothing(dtype, value):
    """Whatever the coordinate, the sample is zero, and so is every gradient through it."""
    tensors = Problem(out_channels=3).tensors(dtype)
    if dtype == torch.float16:
        value = max(min(value, 6e4), -6e4) if abs(value) == 1e30 else value
    with torch.no_grad():
        tensors["offset"].fill_(value)
    assert_samples_nothing(deform_conv2d, tensors, padding=1)


def test_one_bad_offset_leaves_the_others_alone():
    tensors = Problem().tensors()
    with torch.no_grad():
        tensors["offset"][0, 3, 2, 2] = float("nan")
    actual = run(deform_conv2d, tensors, padding=1)
    expected = run(reference.deform_conv2d, exact(tensors), padding=1)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        assert largest_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("deform_groups", [1, 3, 24])
def test_what_is_no_number_stays_where_it_is_used(deform_groups, channels_last):
    """A NaN in the input, or an infinite mask, reaches the pixels that sample it and no others."""
    problem = Problem(1, 24, (40, 9), 5, deform_groups=deform_groups, channels_last=channels_last)
    tensors = {name: t.detach() for name, t in problem.tensors(torch.float32).items()}
    tensors["input"][0, 7, 20, 4] = float("nan")
    tensors["mask"][0, 2, 3, 5] = float("inf")
    actual = deform_conv2d(**tensors, padding=1)
    expected = reference.deform_conv2d(**tensors, padding=1)
    assert 0 < torch.isnan(expected).sum() < expected.numel() / 2
    torch.testing.assert_close(
        actual.nan_to_num(99.0, 99.0, 99.0), expected.float().nan_to_num(99.0, 99.0, 99.0)
    )


def test_samples_that_reach_nothing_take_no_notice_of_the_mask():
    tensors = Problem(out_channels=3).tensors()
    with torch.no_grad():
        tensors["offset"].fill_(1e4)
        tensors["mask"].fill_(float("nan"))
    assert_samples_nothing(deform_conv2d, tensors, padding=1)


@pytest.mark.parametrize("edge", ["low", "high"])
def test_border_is_open_interval(edge):
    """A sample at -1 or at H reaches nothing; just inside, the border pixel fades out."""
    x = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    offset = torch.zeros(1, 2, 4, 4, dtype=torch.float64)
    row, sign = (0, -1.0) if edge == "low" else (3, 1.0)
    for distance, expected in ((1.0, 0.0), (0.75, 0.25), (0.0, 1.0)):
        offset[0, 0, row, 1] = sign * distance
        assert deform_conv2d(x, offset, weight)[0, 0, row, 1].item() == pytest.approx(expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_kept(channels_last):
    problem = Problem(channels_last=channels_last)
    tensors = problem.tensors(torch.float32)
    output = deform_conv2d(**tensors, padding=1)
    output.sum().backward()
    for tensor in (output, tensors["input"].grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() != channels_last


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("deform_groups", [1, 12, 24])
def test_gradients_have_the_layout_of_what_they_are_of(deform_groups, channels_last):
    problem = Problem(
        2,
        24,
        deform_groups=deform_groups,
        channels_last=channels_last,
        points_channels_last=channels_last,
        weight_channels_last=channels_last,
    )
    tensors = problem.tensors(torch.float32)
    names = ("input", "offset", "weight", "mask")
    output = deform_conv2d(**tensors, padding=1)
    gradients = torch.autograd.grad(output.square().sum(), [tensors[name] for name in names])
    for name, gradient in zip(names, gradients):
        assert gradient.stride() == tensors[name].stride(), name


def test_arguments_need_not_be_contiguous():
    problem = Problem(2, 4, (7, 7), 6)
    expected = run(deform_conv2d, problem.tensors(), padding=1)
    tensors = {}
    for name, tensor in problem.tensors().items():
        pairs = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)
        tensors[name] = pairs[..., 0].requires_grad_()
        assert not tensors[name].is_contiguous()
    grad_output = torch.randn(1, generator=torch.Generator().manual_seed(1)).double()
    actual = run(deform_conv2d, tensors, padding=1)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)
    # A gradient that is one number seen through zero strides, as from .sum().
    output = deform_conv2d(**tensors, padding=1)
    (gradient,) = torch.autograd.grad(output, tensors["weight"], grad_output.expand_as(output))
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("deform_groups", [1, 12])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: torch.cat([t, t * 0 + 9], 1)[:, : t.shape[1]],
        lambda t: torch.cat([t * 0 + 9, t], 1).chunk(2, 1)[1],
        lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last).chunk(2, 1)[1],
        lambda t: torch.stack([t, t * 0 + 9], 1)[:, 0],
        lambda t: torch.cat([t, t * 0 + 9], 3)[..., : t.shape[3]],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: t.flip(0).flip(0).as_strided(t.shape, t.stride()),
    ],
    ids=["first", "second", "channels_last", "batch", "width", "transposed", "same"],
)
def test_offsets_and_masks_are_read_where_they_lie(view, deform_groups):
    """As slices of what a convolution gives, for one."""
    problem = Problem(2, 12, (9, 30), 6, deform_groups=deform_groups)
    expected = run(deform_conv2d, problem.tensors(), padding=1)
    tensors = problem.tensors()
    for name in ("offset", "mask"):
        tensors[name] = view(tensors[name].detach()).requires_grad_()
        assert torch.equal(tensors[name], problem.tensors()[name])
    actual = run(deform_conv2d, tensors, padding=1)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("deform_groups", [1, 12])
def test_expanded_offsets(deform_groups):
    """One offset for all images, pixels, or both, without a copy of it for each."""
    problem = Problem(3, 12, (9, 30), 6, deform_groups=deform_groups)
    tensors = {name: t.detach() for name, t in problem.tensors().items()}
    full = tensors["offset"]
    for one in (full[:1], full[:, :, :1, :1], full[:1, :, :1, :1], full[:, :1], full[:, :, :1]):
        tensors["offset"] = one.expand_as(full)
        expected = deform_conv2d(**{**tensors, "offset": tensors["offset"].contiguous()}, padding=1)
        assert torch.equal(deform_conv2d(**tensors, padding=1), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype):
    tensors = Problem(batch=0).tensors(dtype)
    results = run(deform_conv2d, tensors, padding=1)
    assert results["output"].shape == (0, 6, 7, 8)
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    """Asking for one gradient gives the same as asking for all, and computes no other."""
    problem = Problem(1, 40, (6, 5), 6)
    expected = run(deform_conv2d, problem.tensors(), padding=1)
    tensors = problem.tensors()
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    actual = run(deform_conv2d, tensors, padding=1)
    assert torch.equal(actual[f"grad_{wanted}"], expected[f"grad_{wanted}"])
    assert actual.keys() == {"output", f"grad_{wanted}"}


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
        Problem(2, 350, (6, 7), 350),  # weights of which each thread holds a block's at a time
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(problem, dtype):
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(deform_conv2d, problem.tensors(dtype), padding=1))
    torch.set_num_threads(2)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_same(mode):
    tensors = Problem().tensors(torch.float32)
    expected = deform_conv2d(**tensors, padding=1)
    with mode():
        actual = deform_conv2d(**tensors, padding=1)
        with pytest.raises(ValueError, match=r"mask: mask\.shape"):
            deform_conv2d(**{**tensors, "mask": tensors["mask"][:, 1:]}, padding=1)
    assert torch.equal(actual, expected)
    assert not actual.requires_grad


def test_coordinates_are_float32_beside_half_features():
    """At x = 1332.25 a bfloat16 coordinate would be off by pixels."""
    x = torch.arange(1333.0).remainder(64).view(1, 1, 1, 1333).bfloat16()
    offset = torch.zeros(1, 2, 1, 1333)
    offset[:, 1] = -0.75
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    actual = deform_conv2d(x, offset, weight)[0, 0, 0, 1]
    assert actual.item() == 0.25
    exact = deform_conv2d(x.double(), offset.double(), weight.double())
    assert (deform_conv2d(x, offset, weight).double() - exact).abs().max() <= 0.125


@pytest.mark.slow
def test_more_than_2_31_elements():
    """The last channels of the last image are read, and their gradients written, where they lie."""
    channels, size = 4, 24_000  # 2.3e9 elements
    x = torch.zeros(1, channels, size, size, dtype=torch.float16)
    x[0, -1, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.ones(1, channels, 1, 1, dtype=torch.float16, requires_grad=True)
    stride = size - 1
    offset = torch.full((1, 2, 2, 2), -0.5, requires_grad=True)
    output = deform_conv2d(x, offset, weight, stride=stride)
    assert output[0, 0, 1, 1].item() == 2.5
    output.sum().backward()
    assert weight.grad.flatten().tolist() == [0, 0, 0, 2.5]
    assert offset.grad[0, :, 1, 1].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("size", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_input_without_pixels(size):
    """Where the padding alone is larger than the kernel, the output is the bias."""
    x = torch.randn(2, 4, *size, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    offset = torch.zeros(2, 18, size[0] + 4, size[1] + 4, requires_grad=True)
    output = deform_conv2d(x, offset, weight, bias, padding=3)
    assert torch.equal(output, bias.view(6, 1, 1).expand_as(output))
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert not weight.grad.any() and not offset.grad.any()
    assert torch.equal(bias.grad, torch.full((6,), float(output[:, 0].numel())))


# ------------------------------------------------------------------------------ contract with torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(dtype, has_mask, channels_last):
    problem = Problem(has_mask=has_mask, channels_last=channels_last)
    tensors = problem.tensors(dtype)
    for name in ("offset", "mask"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].detach().to(wide(dtype)).requires_grad_()
    x, offset, weight, bias, mask = (tensors[name] for name in NAMES)
    geometry = ([1, 1], [1, 1], [1, 1])
    opcheck(torch.ops.mmdcn.deform_conv2d, (x, offset, weight, bias, *geometry, mask))

    values = [t if t is None else t.detach() for t in (x, offset, weight, mask)]
    x, offset, weight, mask = values
    grad_output = torch.randn(2, 6, 7, 8).to(dtype)
    for wanted in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        arguments = (grad_output, x, offset, weight, *geometry, mask, wanted)
        opcheck(torch.ops.mmdcn.deform_conv2d_backward, arguments)


def test_compiled_operator_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    tensors = {n: t.detach() for n, t in Problem().tensors(torch.float32).items()}
    x, offset, weight, bias, mask = (tensors[name] for name in NAMES)
    geometry = ([1, 1], [1, 1], [1, 1])
    op = torch.ops.mmdcn.deform_conv2d
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


def test_autocast_casts_features_and_leaves_coordinates():
    tensors = Problem().tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = deform_conv2d(**tensors, padding=1)
    assert output.dtype == torch.bfloat16
    half = {n: t if n in ("offset", "mask") else t.bfloat16() for n, t in tensors.items()}
    assert torch.equal(output, deform_conv2d(**half, padding=1))
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


# ------------------------------------------------------------------------------------- bad calls

# What is changed in a good call, and what the error must name.
BAD_CALLS = {
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


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_names_argument_expectation_and_value(case):
    arguments = {n: t.detach() for n, t in Problem().tensors(torch.float32).items()}
    arguments["padding"] = 1
    changed, error, pattern = BAD_CALLS[case]
    deform_conv2d(**arguments)
    with pytest.raises(error, match=re.compile(pattern, re.DOTALL)):
        deform_conv2d(**{**arguments, **changed})


# --------------------------------------------------------------------------------------- peers


def test_matches_mmcv():
    mmcv_ops = pytest.importorskip("mmcv.ops")
    import mmdcn.plugin

    mmdcn.plugin.uninstall()  # mmcv's own kernels
    try:
        for has_mask in (False, True):
            problem = Problem(
                2, 8, (9, 10), 6, (3, 3), (2, 1), (1, 1), (1, 1), 2, 4, has_mask, has_bias=has_mask
            )
            geometry = (problem.stride, problem.padding, problem.dilation)

            def call(input, offset, weight, bias, mask, geometry=geometry):
                if mask is None:
                    return mmcv_ops.deform_conv2d(input, offset, weight, *geometry, 2, 4)
                return mmcv_ops.modulated_deform_conv2d(
                    input, offset, mask, weight, bias, *geometry, 2, 4
                )

            theirs = run(call, problem.tensors())
            ours = run(deform_conv2d, problem.tensors(), **problem.arguments())
            for name, value in theirs.items():
                assert largest_error(ours[name], value) < 1e-12, name
    finally:
        mmdcn.plugin.install()


# ------------------------------------------------------------------------------ instruction sets

CHECK_CAPABILITY = """
from tests.ops.problems import DTYPES, Problem, compare
for dtype in DTYPES:
    compare(Problem(1, 130, (9, 11), 70, (3, 3), deform_groups=2), dtype)
    compare(Problem(2, 12, (7, 8), 6, groups=2, deform_groups=12), dtype)
    compare(Problem(1, 70, (20, 21), 5, deform_groups=35), dtype)
    for layout in (False, True):
        compare(Problem(1, 37, (70, 9), 5, channels_last=layout, spread=15.0), dtype)
    compare(
        Problem(1, 15, (9, 8), 6, deform_groups=3, points_channels_last=True,
                weight_channels_last=True), dtype)
"""


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(capability):
    done = _python(CHECK_CAPABILITY, MMDCN_CPU_CAPABILITY=capability)
    if "this machine has no" in done.stderr:
        pytest.skip(f"no {capability} on this machine")
    assert done.returncode == 0, done.stderr


def test_unknown_instruction_set_is_refused():
    done = _python(CHECK_CAPABILITY, MMDCN_CPU_CAPABILITY="avx1024")
    assert done.returncode != 0
    assert "expected portable, avx2, avx512 or avx512_bf16, got avx1024" in done.stderr


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_problem_defaults_are_a_good_call():
    """The bad calls above each change one thing of a call that works."""
    problem = Problem()
    assert dataclasses.replace(problem, padding=(0, 0)).out_size == (5, 6)
    assert problem.out_size == (7, 8)


# ------------------------------------------------------------------------------ the way straight on


@pytest.fixture
def straight(monkeypatch):
    """What the operator does with each call that goes straight to it; its calls are counted."""
    module = sys.modules["mmdcn.ops.deform_conv"]
    operator, calls = module._OPERATOR, []

    class Operator:
        error = None

        def __call__(self, *arguments, **options):
            return operator(*arguments, **options)

        def forward(self, *arguments, **options):
            calls.append(arguments)
            if self.error is not None:
                raise self.error
            return operator.forward(*arguments, **options)

    watched = Operator()
    watched.calls = calls
    monkeypatch.setattr(module, "_OPERATOR", watched)
    return watched


def small_call(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"input": (1, 2, 4, 4), "offset": (1, 2, 4, 4), "weight": (2, 2, 1, 1)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_device_are_not_tried_again(straight, error):
    """They pass with their own text, without another in front, and keep no tensor alive."""
    straight.error = error
    with pytest.raises(type(error)) as caught:
        deform_conv2d(**small_call())
    assert caught.value is error
    assert error.__context__ is None
    assert len(straight.calls) == 1


def test_a_refused_call_keeps_no_tensor_alive(straight):
    straight.error = torch.OutOfMemoryError("CUDA out of memory")
    tensors = small_call()
    alive = weakref.ref(tensors["input"])
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            deform_conv2d(**tensors)
        straight.error = None
        straight.calls.clear()
        tensors.clear()
        assert alive() is None
    finally:
        gc.enable()


def test_errors_of_arguments_are_named(straight):
    tensors = small_call() | {"offset": torch.zeros(1, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"^offset: offset\.shape\[1\] is not valid"):
        deform_conv2d(**tensors)
    assert len(straight.calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_in_half_precision_fail_nowhere(straight, dtype):
    """They are converted before the operator would refuse them."""
    tensors = small_call(dtype)
    output = deform_conv2d(**tensors)
    assert not straight.calls
    wide = tensors | {"offset": tensors["offset"].float()}
    assert torch.equal(output, deform_conv2d(**wide))
    assert len(straight.calls) == 1
    with pytest.raises(TypeError, match=r"^mask: expected dtype float32 beside"):
        deform_conv2d(**small_call(), mask=torch.ones(1, 1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("decided", [None, False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_tensors_go_straight_where_our_kernels_are_known_to_run(
    decided, deterministic, monkeypatch
):
    """With what stands for tensors on a GPU."""
    module = sys.modules["mmdcn.ops.deform_conv"]
    device = torch.device("cuda", 3)
    tensor = SimpleNamespace(is_cpu=False, is_cuda=True, device=device, dtype=torch.float32)
    monkeypatch.setattr(module, "PLAIN", (SimpleNamespace,))
    if decided is not None:
        monkeypatch.setitem(_devices.DECIDED, device, _devices.Service(decided))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    goes = module._goes_straight(tensor, tensor, tensor, None, tensor)
    assert goes == (decided is True and not deterministic)


@pytest.mark.parametrize("precision, expected", [("tf32", {"allow_tf32": True}), ("ieee", {})])
def test_torchs_setting_for_convolutions_allows_tf32(precision, expected):
    options = sys.modules["mmdcn.ops.deform_conv"]._options
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        assert options(2, torch.empty(0)) == expected
        assert options(2, torch.empty(0, dtype=torch.float16)) == {}
        assert options(3, torch.empty(0)) == {}
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
