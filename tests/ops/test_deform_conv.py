"""Deformable convolution over two dimensions: against the reference, torch's own convolution,
gradcheck and mmcv; layouts; and its contract with torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch.library import opcheck

from mmdcn.ops import deform_conv2d, reference
from tests.ops.problems import (
    DTYPES,
    NAMES,
    Problem,
    compare,
    compiled_arguments,
    detached,
    largest_error,
    problems,
    run,
)

# ---------------------------------------------------------------------------------- the mathematics


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
        # Depthwise: samples inside the window and far outside it, straight from rows, and with
        # several offset groups.
        Problem(2, 70, (40, 9), 70, groups=70, spread=1.0),
        Problem(1, 70, (40, 9), 70, groups=70, spread=25.0, weight_channels_last=True),
        Problem(2, 70, (12, 11), 70, groups=70, channels_last=True, points_channels_last=True),
        # Two blocks, of which one begins in the middle of three tiles.
        Problem(2, 140, (20, 21), 140, groups=140, channels_last=True, spread=3.0),
        Problem(1, 60, (12, 11), 60, groups=60, deform_groups=5, has_bias=False, has_mask=False),
        Problem(1, 24, (9, 70), 24, (5, 3), (2, 1), (2, 1), (1, 2), groups=24, deform_groups=4),
        # A channel to a group, with two outputs each, and with few channels to an offset group.
        Problem(1, 33, (12, 11), 66, groups=33),
        Problem(1, 36, (12, 11), 36, groups=36, deform_groups=12),
        # Several groups to a block of channels, of which the last has fewer.
        Problem(1, 72, (20, 21), 72, groups=12, spread=9.0),
        Problem(2, 105, (12, 11), 63, groups=21, channels_last=True, weight_channels_last=True),
        Problem(1, 136, (12, 11), 17, groups=17, deform_groups=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_in_groups(dtype, problem):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_large_weights_are_rounded_once(dtype):
    """And not after each image, though what is kept from image to image is large then."""
    shapes = {"input": (16, 350, 3, 3), "weight": (350, 350, 3, 3), "grad_output": (16, 350, 3, 3)}
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    offset = torch.zeros(16, 18, 3, 3)  # with which samples are as exact as pixels
    computed = []
    for kind in (dtype, torch.float32):
        x, weight, grad_output = (tensor.detach().to(kind) for tensor in drawn.values())
        weight.requires_grad_()
        deform_conv2d(x, offset, weight, padding=1).backward(grad_output)
        computed.append(weight.grad.float())
    rounding = computed[1].abs() * torch.finfo(dtype).eps / 2
    noise = 1e-6 * computed[1].abs().max()
    assert ((computed[0] - computed[1]).abs() <= 1.01 * rounding + noise).all()


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


# -------------------------------------------------------------------------------- decided semantics


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype):
    tensors = Problem(batch=0).tensors(dtype)
    results = run(deform_conv2d, tensors, padding=1)
    assert results["output"].shape == (0, 6, 7, 8)
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0


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


# ------------------------------------------------------------------------------------------ layouts


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


# ------------------------------------------------------------------------------ contract with torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(dtype, has_mask, channels_last):
    arguments = compiled_arguments(Problem(has_mask=has_mask, channels_last=channels_last), dtype)
    opcheck(torch.ops.mmdcn.deform_conv2d, arguments)
    arguments = detached(arguments)
    del arguments[3]  # the bias
    grad_output = torch.randn(2, 6, 7, 8).to(dtype)
    for wanted in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        opcheck(torch.ops.mmdcn.deform_conv2d_backward, (grad_output, *arguments, wanted))
