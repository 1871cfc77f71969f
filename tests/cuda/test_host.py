"""The CUDA operators' own source, run on the host: kernels and registration, without a GPU."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.modules.utils import _pair

from mmdcn.ops import _library
from mmdcn.ops.deform_conv import _cuda_multiplies_in_tf32 as multiplies_in_tf32
from tests.ops.problems import (
    DTYPES,
    NAMES,
    TOLERANCE,
    Problem,
    assert_samples_nothing,
    compare,
    largest_error,
    problems,
    run,
    wide,
)

# What the kernels for tensor cores compute, and how far from exact: float32 in TF32, with 11 bits.
TENSOR_CORE_TOLERANCE = {**TOLERANCE, torch.float32: 1e-3}
del TENSOR_CORE_TOLERANCE[torch.float64]
# In fixed point sums have fewer bits than in float64.
DETERMINISTIC_TOLERANCE = {**TOLERANCE, torch.float64: 1e-10}


class HostDeformConv2d(torch.autograd.Function):
    """What ``mmdcn.ops.deform_conv2d`` does around the operator, around the host's build of it."""

    @staticmethod
    def forward(
        ctx, input, offset, weight, bias, stride, padding, dilation, mask, tf32, deterministic
    ):
        offset = offset.to(wide(input.dtype))
        mask = None if mask is None else mask.to(wide(input.dtype))
        ctx.geometry = [list(_pair(pair)) for pair in (stride, padding, dilation)]
        ctx.options = {"allow_tf32": tf32, "deterministic": deterministic}
        ctx.save_for_backward(input, offset, weight, mask)
        return torch.ops.mmdcn_host.deform_conv2d(
            input, offset, weight, bias, *ctx.geometry, mask, allow_tf32=tf32
        )

    @staticmethod
    def backward(ctx, grad_output):
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 7)]
        *tensors, mask = ctx.saved_tensors
        gradients = torch.ops.mmdcn_host.deform_conv2d_backward(
            grad_output, *tensors, *ctx.geometry, mask, wanted, **ctx.options
        )
        grad_input, grad_offset, grad_weight, grad_mask = (
            gradient if want else None for gradient, want in zip(gradients, wanted)
        )
        grad_bias = grad_output.sum((0, 2, 3)) if ctx.needs_input_grad[3] else None
        gradients = (grad_input, grad_offset, grad_weight, grad_bias)
        return *gradients, None, None, None, grad_mask, None, None


def host_deform_conv2d(
    input,
    offset,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    mask=None,
    allow_tf32=False,
    deterministic=False,
) -> Tensor:
    return HostDeformConv2d.apply(
        *(input, offset, weight, bias, stride, padding, dilation, mask, allow_tf32, deterministic)
    )


def compare_host(
    problem: Problem, dtype: torch.dtype, tolerance: dict = TOLERANCE, **options: bool
) -> None:
    compare(problem, dtype, host_deform_conv2d, tolerance=tolerance[dtype], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
def test_matches_reference(host_operators, dtype, problem):
    compare_host(problem, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Several tiles in every dimension: pixels, output channels, channels of an offset group.
        Problem(2, 130, (15, 14), 131, channels_last=True),
        Problem(1, 192, (9, 8), 70, deform_groups=2),
        # Offset groups that share a tile; some go on in the next group of the convolution.
        Problem(1, 120, (9, 8), 12, groups=2, deform_groups=3),
        Problem(1, 96, (9, 8), 24, groups=24, deform_groups=12),
        Problem(1, 96, (9, 8), 24, groups=3, deform_groups=96, spread=20.0),
        Problem(1, 3, (20, 70), 5, kernel=(7, 7), padding=(3, 3), stride=(2, 2)),
    ],
    ids=str,
)
def test_matches_reference_across_tiles(host_operators, dtype, problem):
    compare_host(problem, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_offsets_that_reach_nothing(host_operators, dtype, value):
    tensors = Problem().tensors(dtype)
    with torch.no_grad():
        tensors["offset"].fill_(value)
    assert_samples_nothing(host_deform_conv2d, tensors, padding=1)


@pytest.mark.parametrize("wanted", range(16))
def test_gradients_not_asked_for_are_empty(host_operators, wanted):
    problem = Problem(1, 40, (6, 5), 6)
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
    problem = Problem(
        batch=batch, out_channels=out_channels, size=(0 if batch else 7, 8), padding=(2, 1)
    )
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems())
def test_deterministic_gradients_match_reference(host_operators, dtype, problem):
    compare_host(problem, dtype, DETERMINISTIC_TOLERANCE, deterministic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_deterministic_gradients_of_any_size(host_operators, dtype, scale):
    """The unit of the fixed-point sums follows the size of what is added up."""
    scale = scale if dtype == torch.float32 else scale ** (1 / 10)
    grad_output = (torch.randn(2, 6, 7, 8) * scale).to(dtype)
    actual, expected = (
        run(
            host_deform_conv2d,
            Problem().tensors(dtype),
            grad_output,
            padding=1,
            deterministic=deterministic,
        )["grad_input"].double()
        / scale
        for deterministic in (True, False)
    )
    assert expected.abs().max() > 0.1
    assert largest_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deterministic_gradient_of_what_is_not_finite_is_nan(host_operators, value):
    tensors = Problem().tensors(torch.float32)
    grad_output = torch.zeros(2, 6, 7, 8)
    grad_output[0, 1, 2, 3] = value
    results = run(host_deform_conv2d, tensors, grad_output, padding=1, deterministic=True)
    assert results["grad_input"][0].isnan().all()


# ----------------------------------------------------------------------- kernels for tensor cores


@st.composite
def tensor_core_problems(draw) -> Problem:
    """Problems that the kernels for tensor cores take in every dtype but float64.

    Of several output pixels: errors are relative to the largest element, and in TF32 the largest
    of a single pixel's few offset gradients may by chance be small beside what it is a sum of.
    """
    channels, groups, deform_groups = draw(
        st.sampled_from(
            [(32, 1, 1), (64, 1, 1), (160, 1, 1), (64, 2, 1), (64, 1, 2), (128, 2, 4), (128, 4, 2)]
        )
    )
    problem = draw(problems().filter(lambda p: p.batch * math.prod(p.out_size) > 3))
    return dataclasses.replace(
        problem,
        channels=channels,
        groups=groups,
        deform_groups=deform_groups,
        out_channels=groups * draw(st.sampled_from([8, 40, 136] if groups == 1 else [8, 72])),
    )


def compare_on_tensor_cores(tensor_cores, problem: Problem, dtype: torch.dtype, **options) -> None:
    with tensor_cores() as launches:
        compare_host(problem, dtype, TENSOR_CORE_TOLERANCE, allow_tf32=True, **options)
        assert launches() >= 3  # forward, backward to data and to weight


@pytest.mark.parametrize("dtype", TENSOR_CORE_TOLERANCE, ids=str)
@given(problem=tensor_core_problems(), deterministic=st.booleans())
def test_tensor_cores_match_reference(tensor_cores, dtype, problem, deterministic):
    compare_on_tensor_cores(tensor_cores, problem, dtype, deterministic=deterministic)


@pytest.mark.parametrize("dtype", TENSOR_CORE_TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Several tiles in every dimension, and in each of the sizes that tiles have.
        Problem(1, 64, (15, 14), 64, channels_last=True),
        Problem(1, 160, (13, 12), 264, channels_last=True),
        Problem(2, 160, (9, 8), 136, deform_groups=5),
        Problem(1, 256, (9, 8), 144, groups=2, deform_groups=8, has_mask=False),
        # A single pixel.
        Problem(1, 64, (1, 1), 136, kernel=1, padding=0, deform_groups=2, has_mask=False, seed=1),
        # More taps than fit the table of sampling points.
        Problem(1, 32, (20, 21), 8, kernel=(5, 7), padding=(2, 3), stride=(2, 2)),
    ],
    ids=str,
)
def test_tensor_cores_match_reference_across_tiles(tensor_cores, dtype, problem):
    compare_on_tensor_cores(tensor_cores, problem, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
def test_tensor_cores_with_offsets_that_reach_nothing(tensor_cores, value):
    problem = Problem(channels=32, out_channels=8, float32_offset=True)
    tensors = problem.tensors(torch.float16)
    with torch.no_grad():
        tensors["offset"].fill_(value)
    with tensor_cores() as launches:
        assert_samples_nothing(host_deform_conv2d, tensors, padding=1)
        assert launches() >= 3


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_tensor_cores_do_not_read_what_counts_for_nothing(tensor_cores, backward):
    """Pixels that no sample reaches may hold anything."""
    tensors = Problem(1, 32, (6, 6), 8, channels_last=True).tensors(torch.float16)
    with torch.no_grad():
        # Samples lie on pixels, so forward passes need one row only, and slopes the next one too.
        tensors["offset"].zero_()
        tensors["offset"][..., 3 if backward else 4 :, :] = 50.0
        tensors["input"][:, :, 5] = float("nan")
    with tensor_cores():
        results = run(host_deform_conv2d, tensors, padding=1)
    for name in results if backward else ["output"]:
        assert torch.isfinite(results[name]).all(), name


@pytest.mark.parametrize("wanted", range(16))
def test_tensor_cores_compute_what_is_asked_for(tensor_cores, wanted):
    problem = Problem(1, 32, (6, 5), 8)
    tensors = {name: t.detach() for name, t in problem.tensors(torch.float32).items()}
    x, offset, weight, _, mask = (tensors[name] for name in NAMES)
    grad_output = torch.randn(1, 8, 6, 5)
    output_mask = [bool(wanted >> i & 1) for i in range(4)]

    def backward(output_mask):
        return torch.ops.mmdcn_host.deform_conv2d_backward(
            *(grad_output, x, offset, weight, [1, 1], [1, 1], [1, 1], mask, output_mask),
            allow_tf32=True,
        )

    with tensor_cores():
        for gradient, every, want in zip(backward(output_mask), backward([True] * 4), output_mask):
            assert torch.equal(gradient, every) if want else gradient.shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_tensor_cores_take_addresses_that_are_not_aligned(tensor_cores, channels_last):
    problem = Problem(1, 32, (6, 5), 8, channels_last=channels_last, weight_channels_last=True)
    tensors = problem.tensors(torch.float16)
    with tensor_cores():
        expected = run(host_deform_conv2d, tensors, padding=1)
        shifted = {}
        for name, tensor in tensors.items():
            memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
            copy = memory.as_strided(tensor.shape, tensor.stride(), memory.storage_offset())
            shifted[name] = copy.copy_(tensor.detach()).requires_grad_()
        actual = run(host_deform_conv2d, shifted, padding=1)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(
    "problem",
    [
        Problem(1, 33, (6, 5), 8),
        Problem(1, 32, (6, 5), 6),
        Problem(1, 64, (6, 5), 8, deform_groups=4),
        Problem(1, 192, (6, 5), 16, groups=2, deform_groups=3),
    ],
    ids=str,
)
def test_other_problems_are_left_to_the_simple_kernels(tensor_cores, problem):
    with tensor_cores() as launches:
        compare_host(problem, torch.bfloat16)
        assert launches() == 0


def test_float32_is_multiplied_in_tf32_only_where_allowed(tensor_cores):
    problem = Problem(1, 32, (6, 5), 8)
    with tensor_cores() as launches:
        compare_host(problem, torch.float32)
        compare_host(problem, torch.float64, allow_tf32=True)
        assert launches() == 0


@pytest.mark.skipif(_library.cuda_is_loaded(), reason="the CUDA library chooses its kernels itself")
def test_tf32_is_multiplied_in_where_torch_allows_it_for_convolutions():
    def dtype_or_tf32(x):
        return "tf32" if multiplies_in_tf32(x.dtype) else x.dtype

    library = torch.library.Library("mmdcn", "IMPL")
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        library.impl("cuda_kernels", lambda: "tensor_core", "CompositeExplicitAutograd")
        for precision, expected in (("tf32", "tf32"), ("ieee", torch.float32)):
            torch.backends.cudnn.conv.fp32_precision = precision
            for function in (dtype_or_tf32, torch.compile(dtype_or_tf32, fullgraph=True)):
                assert function(torch.zeros(1)) == expected
                assert function(torch.zeros(1).half()) == torch.float16
            torch.compiler.reset()
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
        library._destroy()


@pytest.mark.parametrize(
    "value, kernels", [("", "simple"), ("simple", "simple"), ("tensor_core", "tensor_core")]
)
def test_environment_chooses_kernels(host_library, value, kernels):
    assert tell_kernels(host_library, value).stdout.splitlines()[-1] == kernels


def test_environment_naming_no_kernels(host_library):
    result = tell_kernels(host_library, "fast")
    assert result.returncode != 0
    assert "MMDCN_CUDA_KERNELS: expected simple or tensor_core, got fast" in result.stderr


def tell_kernels(library: Path, value: str) -> subprocess.CompletedProcess:
    code = (
        "import sys, torch\n"
        "from tests.cuda.conftest import load_host_operators\n"
        "operators = load_host_operators(sys.argv[1])\n"
        "print(torch.ops.mmdcn_host.cuda_kernels())\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, library],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "MMDCN_CUDA_KERNELS": value},
    )


# ------------------------------------------------------------------------------------- sanitizers


@pytest.mark.parametrize("sanitizers", ["address,undefined,float-cast-overflow", "thread"])
def test_sanitizers(host_check, sanitizers):
    program = host_check("-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    runs = [("simple", "0", "25", "4"), ("tensor_core", "0", "4", "4")]
    if sanitizers != "thread":  # the geometry of the GPU's blocks
        runs += [("simple", "100", "1", "256"), ("tensor_core", "100", "1", "256")]
    for arguments in runs:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-5000:]
