"""The CUDA operators' own source, run on the host: kernels and registration, without a GPU."""

import subprocess

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.modules.utils import _pair

from mmdcn.ops import reference
from tests.ops.problems import (
    NAMES,
    TOLERANCE,
    Problem,
    assert_samples_nothing,
    exact,
    largest_error,
    problems,
    run,
)

DTYPES = list(TOLERANCE)


class HostDeformConv2d(torch.autograd.Function):
    """What ``mmdcn.ops.deform_conv2d`` does around the operator, around the host's build of it."""

    @staticmethod
    def forward(ctx, input, offset, weight, bias, stride, padding, dilation, mask):
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        offset = offset.to(wide)
        mask = None if mask is None else mask.to(wide)
        ctx.geometry = [list(_pair(pair)) for pair in (stride, padding, dilation)]
        ctx.save_for_backward(input, offset, weight, mask)
        return torch.ops.mmdcn_host.deform_conv2d(input, offset, weight, bias, *ctx.geometry, mask)

    @staticmethod
    def backward(ctx, grad_output):
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7)]
        *tensors, mask = ctx.saved_tensors
        gradients = torch.ops.mmdcn_host.deform_conv2d_backward(
            grad_output, *tensors, *ctx.geometry, mask, wanted
        )
        grad_input, grad_offset, grad_weight, grad_mask = (
            gradient if want else None for gradient, want in zip(gradients, wanted)
        )
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        return grad_input, grad_offset, grad_weight, grad_bias, None, None, None, grad_mask


def host_deform_conv2d(
    input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None
) -> Tensor:
    return HostDeformConv2d.apply(input, offset, weight, bias, stride, padding, dilation, mask)


def compare(problem: Problem, dtype: torch.dtype) -> None:
    """Forward and every gradient against the reference in float64."""
    tensors = problem.tensors(dtype)
    shape = (problem.batch, problem.out_channels, *problem.out_size)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    actual = run(host_deform_conv2d, tensors, grad_output, **problem.arguments())
    expected = run(
        reference.deform_conv2d, exact(tensors), grad_output.double(), **problem.arguments()
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == (dtype if name == "output" else tensors[name[5:]].dtype)
        error = largest_error(actual[name], value)
        assert error <= TOLERANCE[dtype], f"{name} of {problem}: error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
def test_matches_reference(host_operators, dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Several tiles in every dimension: pixels, output channels, channels of an offset group.
        Problem(2, 130, 15, 14, 131, channels_last=True),
        Problem(1, 192, 9, 8, 70, deform_groups=2),
        # Offset groups that share a tile; some go on in the next group of the convolution.
        Problem(1, 120, 9, 8, 12, groups=2, deform_groups=3),
        Problem(1, 96, 9, 8, 24, groups=24, deform_groups=12),
        Problem(1, 96, 9, 8, 24, groups=3, deform_groups=96, spread=20.0),
        Problem(1, 3, 20, 70, 5, kernel=(7, 7), padding=(3, 3), stride=(2, 2)),
    ],
    ids=str,
)
def test_matches_reference_across_tiles(host_operators, dtype, problem):
    compare(problem, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_offsets_that_reach_nothing(host_operators, dtype, value):
    tensors = Problem().tensors(dtype)
    with torch.no_grad():
        tensors["offset"].fill_(value)
    assert_samples_nothing(host_deform_conv2d, tensors, padding=1)


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_not_asked_for_are_empty(host_operators, wanted):
    problem = Problem(1, 40, 6, 5, 6)
    tensors = {name: tensor.detach() for name, tensor in problem.tensors().items()}
    x, offset, weight, _, mask = (tensors[name] for name in NAMES)
    grad_output = torch.randn(1, 6, 6, 5, dtype=torch.float64)
    output_mask = [bool(wanted >> i & 1) for i in range(4)]

    def backward(output_mask):
        return torch.ops.mmdcn_host.deform_conv2d_backward(
            grad_output, x, offset, weight, [1, 1], [1, 1], [1, 1], mask, output_mask
        )

    for gradient, every, want in zip(backward(output_mask), backward([True] * 4), output_mask):
        assert torch.equal(gradient, every) if want else gradient.shape == (0,)


@pytest.mark.parametrize("batch, out_channels", [(0, 6), (2, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_sum(host_operators, dtype, batch, out_channels):
    """An empty batch, and an input without pixels under a padding that gives outputs."""
    problem = Problem(batch=batch, out_channels=out_channels, height=0 if batch else 7)
    problem.padding = (2, 1)
    tensors = problem.tensors(dtype)
    results = run(host_deform_conv2d, tensors, **problem.arguments())
    assert results["output"].shape == (batch, out_channels, *problem.out_size)
    bias = tensors["bias"].detach().view(1, -1, 1, 1)
    assert torch.equal(results["output"], bias.expand_as(results["output"]))
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        if name != "bias":
            assert torch.count_nonzero(results[f"grad_{name}"]) == 0


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts_are_the_fake_kernels(host_operators, dtype, channels_last):
    """Results have the strides promised to the compiler, whatever those of the arguments."""
    tensors = {
        n: t.detach() for n, t in Problem(channels_last=channels_last).tensors(dtype).items()
    }
    x, offset, weight, bias, mask = (tensors[name] for name in NAMES)
    offset, mask = (t.float().contiguous(memory_format=torch.channels_last) for t in (offset, mask))
    geometry = ([1, 1], [1, 1], [1, 1])
    grad_output = torch.randn(2, 6, 7, 8).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
    calls = {
        "deform_conv2d": (x, offset, weight, bias, *geometry, mask),
        "deform_conv2d_backward": (
            *(grad_output, x, offset, weight.contiguous(memory_format=torch.channels_last)),
            *(*geometry, mask, [True] * 4),
        ),
    }
    for name, arguments in calls.items():
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        promised = getattr(torch.ops.mmdcn, name)(*meta)
        actual = getattr(torch.ops.mmdcn_host, name)(*arguments)
        if isinstance(actual, Tensor):
            promised, actual = [promised], [actual]
        for a, p in zip(actual, promised):
            assert (a.shape, a.stride(), a.dtype) == (p.shape, p.stride(), p.dtype), name


@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_sanitizers(host_check, sanitizers):
    program = host_check("-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    runs = [("0", "25", "4")]
    if sanitizers != "thread":
        runs.append(("100", "1", "256"))  # the geometry of the GPU's blocks
    for arguments in runs:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
