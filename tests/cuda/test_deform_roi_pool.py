"""The CUDA source of deformable RoI pooling, run on the host: kernels and registration."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.cuda.promises import assert_promises_kept
from tests.ops.problems import DTYPES, compare, wide
from tests.ops.roi_problems import RoIProblem, roi_problems


class HostDeformRoIPool(torch.autograd.Function):
    """The autograd of ``mmdcn::deform_roi_pool`` around the host's build of it."""

    @staticmethod
    def forward(ctx, input, rois, offset, *arguments):
        ctx.arguments = arguments
        ctx.save_for_backward(input, rois, offset)
        return torch.ops.mmdcn_host.deform_roi_pool(input, rois, offset, *arguments)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        gradients = torch.ops.mmdcn_host.deform_roi_pool_backward(
            grad_output, *ctx.saved_tensors, *ctx.arguments, wanted
        )
        grad_input, grad_offset = (g if want else None for g, want in zip(gradients, wanted))
        return grad_input, None, grad_offset, *[None] * 5


def host_deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    position_sensitive: bool,
) -> Tensor:
    """What ``mmdcn.ops.deform_roi_pool`` does around the operator."""
    if position_sensitive:
        bins = output_size[0] * output_size[1]
        input = input.unflatten(1, (-1, bins)).transpose(1, 2).flatten(1, 2)
    return HostDeformRoIPool.apply(
        input,
        rois.to(wide(input.dtype)),
        None if offset is None else offset.to(wide(input.dtype)),
        list(output_size),
        spatial_scale,
        sampling_ratio,
        gamma,
        position_sensitive,
    )


@settings(max_examples=12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=roi_problems(dyadic=True))
def test_matches_reference(host_operators, dtype, problem):
    compare(problem, dtype, host_deform_roi_pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Several tiles of channels, and more bins than blocks work on at a time.
        RoIProblem(channels=130, output_size=(4, 4), channels_last=True),
        RoIProblem(channels=96, output_size=(4, 4), deform_groups=2, position_sensitive=True),
        # Bins whose points are listed in several rounds, some of them in none.
        RoIProblem(size=(60, 70), output_size=(1, 2), sampling_ratio=0),
        RoIProblem(channels=40, output_size=(2, 2), sampling_ratio=32),
    ],
    ids=str,
)
def test_matches_reference_across_rounds(host_operators, dtype, problem):
    compare(problem, dtype, host_deform_roi_pool)


@pytest.mark.parametrize("number", [2.0, -1.0, float("nan")])
def test_images_that_do_not_exist_are_refused(host_operators, number):
    problem = RoIProblem()
    tensors = problem.tensors()
    tensors["rois"][3, 0] = number
    with pytest.raises(RuntimeError, match="image_of_roi_exists"):
        host_deform_roi_pool(**tensors, **problem.arguments())


@pytest.mark.parametrize("deform_groups", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rois", [0, 5])
def test_results_are_the_fake_kernels(host_operators, dtype, channels_last, deform_groups, rois):
    """Results have the shapes and strides promised to the compiler, whatever is asked for."""
    problem = RoIProblem(rois=rois, channels_last=channels_last, deform_groups=deform_groups)
    tensors = {name: None if t is None else t.detach() for name, t in problem.tensors().items()}
    x, boxes = tensors["input"].to(dtype), tensors["rois"].float()
    offset = None if tensors["offset"] is None else tensors["offset"].float()
    arguments = [x, boxes, offset, [2, 4], 0.25, 2, 0.5, False]
    grad_output = torch.randn(rois, 4, 2, 4).to(dtype)
    calls = [("deform_roi_pool", arguments)]
    for wanted in range(4):
        output_mask = [bool(wanted & 1), bool(wanted & 2)]
        calls.append(("deform_roi_pool_backward", [grad_output, *arguments, output_mask]))
    assert_promises_kept(calls)


def test_sanitizers(check_with_sanitizers):
    check_with_sanitizers("deform_roi_pool", 12)
