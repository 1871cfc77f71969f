"""The operator against the reference, RoI Align, gradcheck, its contract with torch."""

import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

from mmdcn.ops import deform_roi_pool, reference
from tests.ops.problems import (
    DTYPES,
    assert_gradient_alone,
    assert_same_bits,
    compare,
    detached,
    exact,
    largest_error,
    run,
    wide,
)
from tests.ops.roi_problems import RoIProblem, roi_problems

# ------------------------------------------------------------------------------- the mathematics


@settings(max_examples=15)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=roi_problems(dyadic=True))
def test_matches_reference(dtype, problem):
    compare(problem, dtype)


@settings(max_examples=15)
@given(problem=roi_problems(dyadic=False))
def test_matches_reference_at_any_point(problem):
    compare(problem, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Channels that one thread pools in several parts, and gradients in several blocks.
        RoIProblem(channels=300, output_size=(16, 16), rois=3),
        RoIProblem(channels=200, deform_groups=2, channels_last=True),
        # Bins of more pixels than are added up at a time; more points than pixels, and fewer.
        RoIProblem(size=(60, 70), output_size=(1, 2), sampling_ratio=0),
        RoIProblem(size=(6, 7), output_size=(1, 2), sampling_ratio=32),
        RoIProblem(size=(60, 70), output_size=(1, 2), sampling_ratio=4),
    ],
    ids=str,
)
def test_matches_reference_across_blocks(dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("sampling_ratio", [0, 2, 3])
def test_without_offsets_it_is_roi_align(sampling_ratio):
    mmcv_ops = pytest.importorskip("mmcv.ops")
    problem = RoIProblem(2, 5, (12, 15), 8, (3, 7), 0.25, sampling_ratio, 0.1, 0, dyadic=False)
    tensors = problem.tensors()
    box = tensors["rois"][:, 1:].unflatten(1, (2, 2)).sort(dim=1).values  # None inverted.
    tensors["rois"] = torch.cat([tensors["rois"][:, :1], box.flatten(1)], dim=1)

    def roi_align(input, rois, offset):
        return mmcv_ops.roi_align(input, rois, (3, 7), 0.25, sampling_ratio, "avg", True)

    expected = run(roi_align, exact(tensors))
    actual = run(deform_roi_pool, tensors, **problem.arguments())
    for name in ("output", "grad_input"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_an_offset_moves_its_bin():
    """Offsets are x, then y, in fractions of the RoI's size times gamma."""
    x = torch.arange(20.0).view(1, 1, 1, 20) + 100 * torch.arange(20.0).view(1, 1, 20, 1)
    rois = torch.tensor([[0, 4.5, 2.5, 12.5, 6.5]])  # x from 4 to 12, y from 2 to 6
    offset = torch.zeros(1, 2, 2, 2)
    regular = deform_roi_pool(x, rois, offset, 2, 1.0, 2, 0.25)
    torch.testing.assert_close(regular[0, 0], torch.tensor([[306.0, 310.0], [506.0, 510.0]]))
    offset[0, :, 0, 1] = torch.tensor([0.5, 2.0])  # gamma · 0.5 · 8 = 1 and gamma · 2 · 4 = 2
    moved = deform_roi_pool(x, rois, offset, 2, 1.0, 2, 0.25) - regular
    torch.testing.assert_close(moved[0, 0], torch.tensor([[0.0, 201.0], [0.0, 0.0]]))


def test_position_sensitive_bins_pool_their_own_channels():
    problem = RoIProblem(2, 3, (12, 15), 8, (3, 2), position_sensitive=True, dyadic=False)
    tensors = problem.tensors()
    actual = deform_roi_pool(**tensors, **problem.arguments())
    everything = deform_roi_pool(**tensors, **{**problem.arguments(), "position_sensitive": False})
    for c in range(3):
        for i in range(3):
            for j in range(2):
                own = everything[:, 6 * c + 2 * i + j, i, j]
                torch.testing.assert_close(actual[:, c, i, j], own, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("deform_groups, position_sensitive", [(0, False), (2, False), (1, True)])
def test_gradcheck(sampling_ratio, deform_groups, position_sensitive):
    problem = RoIProblem(
        *(2, 2, (5, 6), 3, (2, 2), 0.5, sampling_ratio, 0.3),
        *(deform_groups, position_sensitive),
        dyadic=False,
        spread=0.3,
    )
    tensors = problem.tensors()
    variables = [tensors[name] for name in ("input", "offset") if tensors[name] is not None]

    def call(input, offset=None):
        return deform_roi_pool(input, tensors["rois"], offset, **problem.arguments())

    assert torch.autograd.gradcheck(call, variables)
    assert torch.autograd.gradgradcheck(call, variables, fast_mode=True)


def test_gradients_match_the_reference_on_many_rois():
    """A batch of the size that a detector trains on, at points that are nobody's special case."""
    problem = RoIProblem(
        2, 16, (25, 34), 128, (7, 7), 1 / 16, 0, 0.1, dyadic=False, spread=0.5, seed=3
    )
    tensors = problem.tensors()
    actual = run(deform_roi_pool, tensors, **problem.arguments())
    expected = run(reference.deform_roi_pool, exact(tensors), **problem.arguments())
    for name, value in expected.items():
        assert largest_error(actual[name], value) < 1e-12, name


# ---------------------------------------------------------------------------- decided semantics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, -6e4])
@pytest.mark.parametrize("where", ["rois", "offset"])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_points_that_reach_nothing(dtype, value, where, sampling_ratio):
    """Whatever the coordinate, the bin is zero, and so is every gradient through it."""
    problem = RoIProblem(sampling_ratio=sampling_ratio, spatial_scale=1.0)
    tensors = problem.tensors(dtype)
    tensors["rois"][:, 1:] = torch.tensor([2.0, 2.0, 7.0, 7.0])
    with torch.no_grad():
        if where == "rois":
            tensors["rois"][:, 1:] = value
        else:
            tensors["offset"].fill_(value)
    results = run(deform_roi_pool, tensors, **problem.arguments())
    for name, result in results.items():
        assert torch.count_nonzero(result) == 0, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [1e4, 1e7, 1e20, 1e38])
def test_giant_boxes_are_pooled_at_once(dtype, side):
    """Millions of points a bin, of which those on the features count; nothing overflows."""
    x = torch.ones(1, 1, 4, 4, dtype=dtype, requires_grad=True)
    rois = torch.tensor([[0, -side, -side, side, side]], dtype=wide(dtype))
    offset = torch.zeros(1, 2, 2, 2, dtype=wide(dtype), requires_grad=True)
    output = deform_roi_pool(x, rois, offset, 2)
    output.sum().backward()
    assert torch.isfinite(offset.grad).all()
    # From -1 to the origin, and from there to 4: so many points of `side` a dimension.
    if side == 1e4:
        expected = torch.tensor([[1.0, 4.0], [4.0, 16.0]]) * 2.25 / side**2
        torch.testing.assert_close(output[0, 0].double(), expected.double(), rtol=1.0, atol=0)
    assert (output >= 0).all()
    assert (output < 1e-6).all()


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("corner", range(1, 5))
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_the_reference_takes_infinite_boxes(value, corner, sampling_ratio):
    problem = RoIProblem(sampling_ratio=sampling_ratio)
    tensors = problem.tensors()
    tensors["rois"][2, corner] = value
    actual = run(deform_roi_pool, tensors, **problem.arguments())
    expected = run(reference.deform_roi_pool, exact(tensors), **problem.arguments())
    assert not actual["output"][2].any() and actual["output"].any()
    for name, wanted in expected.items():
        assert largest_error(actual[name], wanted) < 1e-12, name


def test_an_infinite_box_beside_good_ones():
    problem = RoIProblem()
    tensors = problem.tensors()
    expected = run(deform_roi_pool, problem.tensors(), **problem.arguments())
    tensors["rois"][2, 3] = float("inf")
    actual = run(deform_roi_pool, tensors, **problem.arguments())
    for name in ("output", "grad_offset"):
        assert torch.count_nonzero(actual[name][2]) == 0
        kept = [0, 1, 3, 4]
        assert torch.equal(actual[name][kept], expected[name][kept])


def test_inverted_and_empty_boxes():
    x = torch.arange(10.0).expand(1, 1, 10, 10).contiguous()
    box, inverted, empty = [2.0, 2.0, 8.0, 8.0], [8.0, 8.0, 2.0, 2.0], [4.0, 4.0, 4.0, 4.0]
    rois = torch.tensor([[0.0, *b] for b in (box, inverted, empty)])
    forward, backward, point = deform_roi_pool(x, rois, None, 3, 1.0, 2)
    torch.testing.assert_close(backward, forward.flip(1, 2))
    torch.testing.assert_close(point, torch.full((1, 3, 3), 3.5))
    adaptive = deform_roi_pool(x, rois, None, 3, 1.0, 0)
    torch.testing.assert_close(adaptive[0], forward)
    assert torch.count_nonzero(adaptive[1:]) == 0


def test_border_goes_on_for_a_pixel():
    x = torch.full((1, 1, 4, 4), 5.0)
    for distance, expected in ((0.0, 5.0), (1.0, 5.0), (1.01, 0.0)):
        # The only point of the bin lies `distance` before the first column.
        rois = torch.tensor([[0, 0.5 - distance - 1, 0.5, 0.5 - distance + 1, 4.5]])
        assert deform_roi_pool(x, rois, None, 1, 1.0, 1).item() == expected
        rois = torch.tensor([[0, 0.5, 3.5 + distance - 1, 4.5, 3.5 + distance + 1]])
        assert deform_roi_pool(x, rois, None, 1, 1.0, 1).item() == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deform_groups", [0, 1])
def test_no_rois(dtype, deform_groups):
    problem = RoIProblem(rois=0, deform_groups=deform_groups)
    tensors = problem.tensors(dtype)
    results = run(deform_roi_pool, tensors, **problem.arguments())
    assert results["output"].shape == (0, 4, 2, 4)
    assert results["grad_input"].shape == tensors["input"].shape
    assert torch.count_nonzero(results["grad_input"]) == 0


def test_no_images_and_no_pixels():
    empty = torch.zeros(0, 3, 4, 4)
    assert deform_roi_pool(empty, torch.zeros(0, 5), None, 7).shape == (0, 3, 7, 7)
    flat = torch.zeros(1, 3, 0, 4, requires_grad=True)
    output = deform_roi_pool(flat, torch.ones(2, 5) * 0, None, 2, sampling_ratio=2)
    assert torch.equal(output, torch.zeros(2, 3, 2, 2))
    output.sum().backward()
    assert flat.grad.shape == flat.shape


@pytest.mark.parametrize("number", [2.0, -1.0, float("nan"), 1e30])
def test_images_that_do_not_exist_are_refused(number):
    problem = RoIProblem()
    tensors = problem.tensors()
    tensors["rois"][3, 0] = number
    with pytest.raises(RuntimeError, match=r"rois: .* from 0 to 1, got .* in row 3"):
        deform_roi_pool(**tensors, **problem.arguments())


@pytest.mark.parametrize("channels_last", [False, True])
def test_layouts(channels_last):
    """The output is contiguous, as fully connected layers want it; gradients are as the input."""
    problem = RoIProblem(channels_last=channels_last)
    tensors = problem.tensors(torch.float32)
    output = deform_roi_pool(**tensors, **problem.arguments())
    assert output.is_contiguous()
    output.sum().backward()
    gradient = tensors["input"].grad
    assert gradient.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert gradient.is_contiguous() != channels_last


def test_arguments_need_not_be_contiguous():
    problem = RoIProblem()
    expected = run(deform_roi_pool, problem.tensors(), **problem.arguments())
    tensors = {}
    for name, tensor in problem.tensors().items():
        pairs = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)
        tensors[name] = pairs[..., 0].requires_grad_(name != "rois")
        assert not tensors[name].is_contiguous()
    actual = run(deform_roi_pool, tensors, **problem.arguments())
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("wanted", ["input", "offset"])
def test_each_gradient_alone(wanted):
    assert_gradient_alone(RoIProblem(channels=40), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        RoIProblem(channels=200, size=(50, 60), rois=300, output_size=(7, 7), dyadic=False),
        RoIProblem(3, 36, (50, 60), 300, (3, 3), deform_groups=3, position_sensitive=True),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(problem, dtype):
    assert_same_bits(problem, dtype)


# ------------------------------------------------------------------------------ contract with torch


def compiled_arguments(problem: RoIProblem, dtype: torch.dtype) -> tuple:
    """What the compiled operator takes, for a problem that is not position-sensitive."""
    tensors = problem.tensors(dtype)
    offset = tensors["offset"]
    if offset is not None:
        offset = offset.detach().to(wide(dtype)).requires_grad_()
    geometry = (list(problem.output_size), problem.spatial_scale, problem.sampling_ratio)
    rois = tensors["rois"].to(wide(dtype))
    return tensors["input"], rois, offset, *geometry, problem.gamma, False


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deform_groups", [0, 2])
def test_opcheck(dtype, deform_groups):
    arguments = compiled_arguments(RoIProblem(deform_groups=deform_groups), dtype)
    opcheck(torch.ops.mmdcn.deform_roi_pool, arguments)
    arguments = detached(arguments)
    grad_output = torch.randn(5, 4, 2, 4).to(dtype)
    for wanted in ([True, True], [True, False], [False, True]):
        opcheck(torch.ops.mmdcn.deform_roi_pool_backward, (grad_output, *arguments, wanted))


def test_compiled_operator_refuses_what_does_not_fit():
    """Called past the checks in Python, it still reads nothing out of bounds."""
    good = list(compiled_arguments(RoIProblem(), torch.float32))
    x, rois, offset = (t.detach() for t in good[:3])
    op = torch.ops.mmdcn.deform_roi_pool
    op(*good)
    for place, bad in (
        (0, x[0]),
        (0, x[:, :0]),
        (0, x[..., :1].expand(-1, -1, -1, 2**30)),
        (1, rois[:, :4]),
        (1, rois.double()),
        (2, offset[:, :1]),
        (2, offset[:-1]),
        (2, offset[..., :-1]),
        (2, offset.repeat(1, 3, 1, 1)),
        (2, offset.double()),
        (3, [2, 0]),
        (5, 2**40),
        (7, True),
    ):
        arguments = [*good]
        arguments[place] = bad
        with pytest.raises(RuntimeError, match="deform_roi_pool"):
            op(*arguments)
