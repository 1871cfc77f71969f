"""The CUDA source of deformable convolution, run on the host: kernels and registration."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmdcn.ops import _products
from tests.cuda.host_deform_conv import EXACT, MEMORY, host_deform_conv
from tests.cuda.promises import assert_promises_kept
from tests.ops.problems import (
    DTYPES,
    LINE_VOLUME,
    NAMES,
    TOLERANCE,
    VOLUME,
    Problem,
    assert_samples_nothing,
    compare,
    largest_error,
    problems,
    run,
)

# In fixed point sums have fewer bits than in float64.
DETERMINISTIC_TOLERANCE = {**TOLERANCE, torch.float64: 1e-10}


@pytest.fixture(autouse=True)
def operators(host_operators, set_memory):
    set_memory(3000, 3000)
    with _products.imposed(EXACT):
        yield host_operators


# -------------------------------------------------------------------------------- the mathematics


@settings(max_examples=25)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems(ranks=(2, 3)), memory=st.sampled_from(MEMORY))
def test_matches_reference(set_memory, dtype, problem, memory):
    set_memory(*memory)
    compare(problem, dtype, host_deform_conv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize(
    "problem",
    [
        # Vectors of channels, in each of the layouts.
        Problem(3, 16, (7, 6), 6),
        Problem(3, 16, (7, 6), 6, channels_last=True),
        # Biases of vectors of pixels, and of channels.
        Problem(2, 8, (4, 8), 16),
        Problem(2, 8, (7, 6), 16, channels_last=True),
        # Groups and offset groups, the one in the other and neither.
        Problem(2, 48, (7, 6), 4, groups=2, deform_groups=3),
        Problem(2, 48, (7, 6), 12, groups=3, deform_groups=1, channels_last=True),
        Problem(2, 12, (7, 6), 12, groups=12, deform_groups=4),
        Problem(2, 12, (7, 6), 4, groups=1, deform_groups=12, has_mask=False),
    ],
    ids=str,
)
def test_matches_reference_in_chunks(set_memory, dtype, problem, memory):
    set_memory(*memory)
    compare(problem, dtype, host_deform_conv)


@settings(max_examples=20)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@given(
    batch=st.integers(1, 40),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    images_of_span=st.integers(1, 12),
    images_of_chunk=st.integers(1, 12) | st.fractions(0, 2),
)
# The last span is shorter than the others, and is a single chunk, where these are two.
@example(batch=9, size=(1, 2), images_of_span=5, images_of_chunk=4)
def test_every_chunk_has_memory_of_its_size(
    set_memory, dtype, batch, size, images_of_span, images_of_chunk
):
    """However spans and chunks cut a batch: the host's kernels look how much they are given."""
    problem = Problem(batch, 4, size, 2)
    pixels = math.prod(size)
    row = 4 * 9 * dtype.itemsize
    copied = 4 * pixels * dtype.itemsize
    set_memory(int(images_of_chunk * pixels * row), images_of_span * copied)
    compare(problem, dtype, host_deform_conv)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30, 3e9])
@pytest.mark.parametrize("problem", [Problem(), LINE_VOLUME, VOLUME], ids=["2d", "line", "volume"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_offsets_that_reach_nothing(dtype, value, problem):
    tensors = problem.tensors(dtype)
    with torch.no_grad():
        tensors["offset"].fill_(value)
        tensors["mask"].fill_(float("nan"))
    assert_samples_nothing(host_deform_conv, tensors, **problem.arguments())


@pytest.mark.parametrize("channels", [3, 16])
def test_what_counts_for_nothing_is_not_read(channels):
    """Pixels that no sample reaches may hold anything."""
    tensors = Problem(1, channels, (6, 6), 8).tensors(torch.float32)
    with torch.no_grad():
        # Samples lie on pixels of the rows above, and slopes need the next row too.
        tensors["offset"].zero_()
        tensors["offset"][..., 3:, :] = 50.0
        tensors["input"][:, :, 5] = float("nan")
    for name, result in run(host_deform_conv, tensors, padding=1).items():
        assert torch.isfinite(result).all(), name


# ------------------------------------------------------------------------- promises of the operator


@pytest.mark.parametrize("wanted", range(16))
@pytest.mark.parametrize("problem", [Problem(1, 40, (6, 5), 6), VOLUME], ids=["2d", "volume"])
def test_gradients_not_asked_for_are_empty(problem, wanted):
    tensors = {name: tensor.detach() for name, tensor in problem.tensors().items()}
    x, offset, weight, _, mask = (tensors[name] for name in NAMES)
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    grad_output = torch.randn(problem.out_shape, dtype=torch.float64)
    output_mask = [bool(wanted >> i & 1) for i in range(4)]
    name = "deform_conv2d_backward" if problem.rank == 2 else "deform_conv_nd_backward"
    operator = getattr(torch.ops.mmdcn_host, name)

    def backward(output_mask):
        return operator(grad_output, x, offset, weight, *geometry, mask, output_mask)

    for gradient, every, want in zip(backward(output_mask), backward([True] * 4), output_mask):
        if want:
            torch.testing.assert_close(gradient, every)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("batch, out_channels", [(0, 6), (2, 6)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_sum(dtype, batch, out_channels):
    """An empty batch, and an input without pixels under a padding that gives outputs."""
    problem = Problem(
        batch=batch, out_channels=out_channels, size=(0 if batch else 7, 8), padding=(2, 1)
    )
    tensors = problem.tensors(dtype)
    results = run(host_deform_conv, tensors, **problem.arguments())
    assert results["output"].shape == (batch, out_channels, *problem.out_size)
    bias = tensors["bias"].detach().view(1, -1, 1, 1)
    assert torch.equal(results["output"], bias.expand_as(results["output"]))
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        if name != "bias":
            assert torch.count_nonzero(results[f"grad_{name}"]) == 0


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [2, 3])
def test_results_are_the_fake_kernels(rank, dtype, channels_last, batch):
    """Results have the shapes and strides promised to the compiler, whatever is asked for."""
    problem = VOLUME if rank == 3 else Problem(channels_last=channels_last)
    x, offset, weight, bias, mask = (problem.tensors(dtype)[name].detach() for name in NAMES)
    offset, mask = offset[:batch].float(), mask[:batch].float()
    if channels_last:
        memory_format = torch.channels_last if rank == 2 else torch.channels_last_3d
        x, offset, mask, weight = (
            t.contiguous(memory_format=memory_format) for t in (x, offset, mask, weight)
        )
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    grad_output = torch.randn(batch, *problem.out_shape[1:]).to(dtype)
    grad_output = grad_output.transpose(2, 3).contiguous().transpose(2, 3)
    name = "deform_conv2d" if rank == 2 else "deform_conv_nd"
    calls = [(name, [x[:batch], offset, weight, bias, *geometry, mask])]
    for wanted in range(16):
        output_mask = [bool(wanted >> i & 1) for i in range(4)]
        arguments = [grad_output, x[:batch], offset, weight, *geometry, mask, output_mask]
        calls.append((f"{name}_backward", arguments))
    assert_promises_kept(calls)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_addresses_need_not_be_aligned(channels_last):
    problem = Problem(2, 32, (6, 5), 8, channels_last=channels_last, weight_channels_last=True)
    tensors = problem.tensors(torch.float16)
    expected = run(host_deform_conv, tensors, padding=1)
    shifted = {}
    for name, tensor in tensors.items():
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
        copy = memory.as_strided(tensor.shape, tensor.stride(), memory.storage_offset())
        shifted[name] = copy.copy_(tensor.detach()).requires_grad_()
    actual = run(host_deform_conv, shifted, padding=1)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


# ------------------------------------------------------------------------------------ deterministic


@settings(max_examples=25)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems(ranks=(2, 3)), memory=st.sampled_from(MEMORY))
def test_deterministic_gradients_match_reference(set_memory, dtype, problem, memory):
    set_memory(*memory)
    compare(
        problem,
        dtype,
        host_deform_conv,
        tolerance=DETERMINISTIC_TOLERANCE[dtype],
        deterministic=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_deterministic_gradients_of_any_size(dtype, scale):
    """The unit follows the values: nothing overflows and nothing is rounded to zero."""
    grad_output = torch.randn(2, 6, 7, 8, dtype=torch.float64).to(dtype)
    expected, actual = (
        run(host_deform_conv, Problem().tensors(dtype), grad, padding=1, deterministic=scaled)
        for grad, scaled in ((grad_output, False), (grad_output * scale, True))
    )
    gradient = actual["grad_input"].double() / scale
    assert largest_error(gradient, expected["grad_input"].double()) <= 4 * TOLERANCE[dtype]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deterministic_gradient_of_what_is_not_finite_is_nan(value):
    tensors = Problem().tensors(torch.float32)
    grad_output = torch.zeros(2, 6, 7, 8)
    grad_output[0, 1, 2, 3] = value
    results = run(host_deform_conv, tensors, grad_output, padding=1, deterministic=True)
    assert results["grad_input"][0].isnan().all()


def test_deterministic_gradient_of_what_half_precision_cannot_hold_is_nan():
    """The columns' gradients are too large for float16, as loss scales make them at first."""
    tensors = Problem(1).tensors(torch.float16)
    with torch.no_grad():
        tensors["weight"].fill_(100.0)
    grad_output = torch.full((1, 6, 7, 8), 6e4).half()
    results = run(host_deform_conv, tensors, grad_output, padding=1, deterministic=True)
    assert results["grad_input"].isnan().all()


# --------------------------------------------------------------------------------------- sanitizers


def test_sanitizers(check_with_sanitizers):
    check_with_sanitizers("deform_conv", 12)
