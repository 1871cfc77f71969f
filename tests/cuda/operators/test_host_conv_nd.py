"""The CUDA source of three-dimensional convolution, run on the host: kernels and registration."""

import subprocess

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.cuda.operators.promises import assert_promises_kept
from tests.ops.problems import (
    DTYPES,
    LINE_VOLUME,
    NAMES,
    VOLUME,
    Problem,
    assert_samples_nothing,
    compare,
    problems,
    wide,
)


class HostDeformConvNd(torch.autograd.Function):
    """The autograd of ``mmdcn::deform_conv_nd`` around the host's build of it."""

    @staticmethod
    def forward(ctx, input, offset, weight, bias, mask, *geometry):
        ctx.geometry = geometry
        ctx.save_for_backward(input, offset, weight, mask)
        operator = torch.ops.mmdcn_host_operators.deform_conv_nd
        return operator(input, offset, weight, bias, *geometry, mask)

    @staticmethod
    def backward(ctx, grad_output):
        *tensors, mask = ctx.saved_tensors
        wants = ctx.needs_input_grad
        wanted = [wants[0], wants[1], wants[2], wants[4]]
        gradients = torch.ops.mmdcn_host_operators.deform_conv_nd_backward(
            grad_output, *tensors, *ctx.geometry, mask, wanted
        )
        gradients = [g if want else None for g, want in zip(gradients, wanted)]
        grad_bias = grad_output.transpose(0, 1).flatten(1).sum(1) if wants[3] else None
        return *gradients[:3], grad_bias, gradients[3], None, None, None


def host_deform_conv(input, offset, weight, bias, mask, stride, padding, dilation) -> Tensor:
    """What ``mmdcn.ops`` does around the operator."""
    offset, mask = (None if t is None else t.to(wide(input.dtype)) for t in (offset, mask))
    geometry = (list(numbers) for numbers in (stride, padding, dilation))
    return HostDeformConvNd.apply(input, offset, weight, bias, mask, *geometry)


@settings(max_examples=12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems(ranks=(3,)))
def test_matches_reference(host_operators, dtype, problem):
    compare(problem, dtype, host_deform_conv)


@pytest.mark.parametrize(
    "problem",
    [
        # Several tiles of output channels and of channels.
        Problem(2, 140, (1, 1, 40), 70, (1, 1, 3), padding=(0, 0, 1), deform_groups=2),
        Problem(2, 36, (3, 3, 4), 66, (1, 2, 2), groups=2, deform_groups=3),
    ],
    ids=str,
)
def test_matches_reference_across_tiles(host_operators, problem):
    compare(problem, torch.float64, host_deform_conv)


@pytest.mark.parametrize("problem", [LINE_VOLUME, VOLUME], ids=["line", "volume"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
def test_offsets_that_reach_nothing(host_operators, value, problem):
    tensors = problem.tensors(torch.float32)
    with torch.no_grad():
        tensors["offset"].fill_(value)
        tensors["mask"].fill_(float("nan"))
    assert_samples_nothing(host_deform_conv, tensors, **problem.arguments())


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("problem", [LINE_VOLUME, VOLUME], ids=["line", "volume"])
def test_results_are_the_fake_kernels(host_operators, problem, batch):
    """Results have the shapes and strides promised to the compiler, whatever is asked for."""
    x, offset, weight, bias, mask = (problem.tensors(torch.float16)[n].detach() for n in NAMES)
    offset, mask = offset[:batch].float(), mask[:batch].float()
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    grad_output = torch.randn(batch, 6, *problem.out_size).half()
    calls = [("deform_conv_nd", [x[:batch], offset, weight, bias, *geometry, mask])]
    for wanted in range(16):
        output_mask = [bool(wanted >> i & 1) for i in range(4)]
        arguments = [grad_output, x[:batch], offset, weight, *geometry, mask, output_mask]
        calls.append(("deform_conv_nd_backward", arguments))
    assert_promises_kept(calls)


@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_sanitizers(check, sanitizers):
    flags = ("-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    program = check("check_conv_nd.cpp", *flags)
    runs = [("0", "12", "4")]
    if sanitizers != "thread":
        runs.append(("100", "1", "256"))  # the geometry of the GPU's blocks
    for arguments in runs:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
