"""Memory of convolutions' CUDA source, run on the host: layouts, spans of a batch, a bound."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda.host_deform_conv import MEMORY, host_deform_conv
from tests.ops.problems import NAMES, TOLERANCE, VOLUME, Problem, largest_error, run

pytestmark = pytest.mark.usefixtures("host_operators")


@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("problem", [Problem(5, 16, (7, 6), 6), VOLUME], ids=["2d", "volume"])
def test_offsets_may_have_any_strides(set_memory, problem, memory):
    """As those of a channels-last convolution, whose gradients are then so, too."""
    set_memory(*memory)
    tensors = problem.tensors(torch.float64)
    expected = run(host_deform_conv, tensors, **problem.arguments())
    for name in ("offset", "mask"):
        moved = tensors[name].detach().movedim(1, -1).contiguous().movedim(-1, 1)
        tensors[name] = moved.requires_grad_()
    actual = run(host_deform_conv, tensors, **problem.arguments())
    for name, value in expected.items():
        assert largest_error(actual[name], value) <= TOLERANCE[torch.float64], name


def peak_bytes(function, *arguments, **options) -> int:
    """The most memory that a call takes at a time, beyond what it returns."""
    # The products are torch's own here, and oneDNN's take memory of their own on some processors.
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        results = function(*arguments, **options)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    taken = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    results = [results] if isinstance(results, Tensor) else results
    return max(taken) - sum(t.numel() * t.element_size() for t in results)


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(
    "problem",
    # Of the last, images that follow one another have addresses that 16 does not divide.
    [Problem(1, 16, (24, 25), 8), VOLUME, Problem(1, 95, (5, 5), 2)],
    ids=["2d", "volume", "odd"],
)
def test_memory_is_bounded_at_any_batch(
    host_operators, set_memory, problem, batch, channels_last, dtype, deterministic
):
    """By one chunk, the copies of so many images, and what a single image needs."""
    chunk, copies = 200_000, 50_000
    set_memory(chunk, copies)
    problem = dataclasses.replace(problem, batch=batch)
    x, offset, weight, bias, mask = (problem.tensors(dtype)[name].detach() for name in NAMES)
    offset, mask = offset.float(), mask.float()
    if channels_last:
        memory_format = torch.channels_last if problem.rank == 2 else torch.channels_last_3d
        x, offset, mask = (t.contiguous(memory_format=memory_format) for t in (x, offset, mask))
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    grad_output = torch.randn(problem.out_shape).to(dtype)

    image = sum(t[0].numel() * 2 * 4 for t in (grad_output, offset, mask))
    image += x[0].numel() * (dtype.itemsize + 4 + 8 * deterministic)
    # The weight's gradient is added up in float32, one chunk after the other.
    of_weight = weight.numel() * (dtype.itemsize + 2 * 4)
    allowed = chunk + max(copies, image) + of_weight + 4096

    name = "deform_conv2d" if problem.rank == 2 else "deform_conv_nd"
    forward, backward = getattr(host_operators, name), getattr(host_operators, f"{name}_backward")
    assert peak_bytes(forward, x, offset, weight, bias, *geometry, mask) <= allowed
    arguments = (grad_output, x, offset, weight, *geometry, mask, [True] * 4)
    assert peak_bytes(backward, *arguments, deterministic=deterministic) <= allowed


@pytest.mark.parametrize("out_channels", [2, 64])
def test_columns_and_their_product_are_bounded_together(host_operators, set_memory, out_channels):
    """cuDNN's product of a chunk is copied into planes, and may be larger than the columns."""
    chunk, copies = 2000, 5000
    set_memory(chunk, copies)
    problem = Problem(3, 2, (24, 25), out_channels, kernel=(1, 1), padding=(0, 0))
    x, offset, weight, _, mask = (problem.tensors(torch.float16)[name].detach() for name in NAMES)
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    taken = []

    def convolution(self, *_, out):
        taken.append((self.numel() + out.numel()) * out.element_size())
        return out.zero_()

    library = torch.library.Library("aten", "IMPL")
    library.impl("cudnn_convolution.out", convolution, "CPU")
    host_operators.set_cuda_product(-1, "output", "float16", "cudnn")
    try:
        host_operators.deform_conv2d(x, offset.float(), weight, None, *geometry, mask.float())
    finally:
        host_operators.set_cuda_product(-1, "output", "float16", "matmul")
        library._destroy()
    assert len(taken) > 1
    assert chunk // 2 < max(taken) <= chunk + copies
