"""The CUDA source of deformable aggregation, run on the host: kernels and registration."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.modules.utils import _pair

from tests.cuda.promises import assert_promises_kept
from tests.ops.aggregate_problems import (
    AggregateProblem,
    aggregate_problems,
    assert_any_strides_of_size_one,
)
from tests.ops.problems import DTYPES, compare, run, wide


class HostDeformAggregate(torch.autograd.Function):
    """The autograd of ``mmdcn::deform_aggregate`` around the host's build of it."""

    @staticmethod
    def forward(ctx, input, offset, mask, *geometry):
        ctx.geometry = geometry
        ctx.save_for_backward(input, offset, mask)
        return torch.ops.mmdcn_host.deform_aggregate(input, offset, mask, *geometry)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.mmdcn_host.deform_aggregate_backward(
            grad_output, *ctx.saved_tensors, *ctx.geometry, wanted
        )
        return *(g if want else None for g, want in zip(gradients, wanted)), *[None] * 6


def host_dcnv3(
    input, offset, mask, kernel_size, stride, padding, dilation, group, offset_scale, remove_center
) -> Tensor:
    """What ``mmdcn.ops.dcnv3`` does around the operator."""
    offset, mask = (t.to(wide(input.dtype)).unflatten(3, (group, -1)) for t in (offset, mask))
    pairs = [list(_pair(pair)) for pair in (kernel_size, stride, padding, dilation)]
    return HostDeformAggregate.apply(input, offset, mask, *pairs, offset_scale, remove_center)


@settings(max_examples=12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=aggregate_problems())
def test_matches_reference(host_operators, dtype, problem):
    compare(problem, dtype, host_dcnv3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Several rounds of taps and tiles of channels.
        AggregateProblem(channels=130, group=2, kernel=(5, 5), padding=(2, 2)),
        AggregateProblem(channels=40, group=1, kernel=(7, 3), padding=(3, 1), remove_center=True),
    ],
    ids=str,
)
def test_matches_reference_across_rounds(host_operators, dtype, problem):
    compare(problem, dtype, host_dcnv3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_offsets_that_reach_nothing(host_operators, dtype, value):
    problem = AggregateProblem()
    tensors = problem.tensors(dtype)
    with torch.no_grad():
        tensors["offset"].fill_(value)
        tensors["mask"].fill_(float("nan"))
    for name, result in run(host_dcnv3, tensors, **problem.arguments()).items():
        assert torch.count_nonzero(result) == 0, name


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_are_the_fake_kernels(host_operators, dtype, batch):
    """Results have the shapes and strides promised to the compiler, whatever is asked for."""
    problem = AggregateProblem(batch=batch)
    x, offset, mask = (t.detach() for t in problem.tensors(dtype).values())
    packed = torch.cat([t.float().unflatten(3, (2, -1)) for t in (offset, mask)], dim=-1)
    geometry = ([3, 3], [1, 1], [1, 1], [1, 1], 1.0, False)
    arguments = [x, packed[..., :18], packed[..., 18:], *geometry]
    grad_output = torch.randn(batch, 7, 8, 8).to(dtype)
    calls = [("deform_aggregate", arguments)]
    for wanted in range(8):
        output_mask = [bool(wanted >> i & 1) for i in range(3)]
        calls.append(("deform_aggregate_backward", [grad_output, *arguments, output_mask]))
    assert_promises_kept(calls)


@pytest.mark.parametrize("size", itertools.product((1, 3), repeat=3), ids=str)
def test_dimensions_of_size_one_may_have_any_stride(host_operators, size):
    assert_any_strides_of_size_one(host_operators, *size)


def test_sanitizers(check_with_sanitizers):
    check_with_sanitizers("deform_aggregate", 12)
