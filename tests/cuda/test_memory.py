"""Memory of convolutions' CUDA source, run on the host: layouts, spans of a batch, a bound."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.cuda.host_deform_conv import MEMORY, host_deform_conv
from tests.ops.problems import NAMES, TOLERANCE, VOLUME, Problem, largest_error, run

pytestmark = pytest.mark.usefixtures("host_operators")


def channels_last(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As a channels-last convolution's, whose gradients are then so, too."""
    return tuple(t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (offset, mask))


def predicted_together(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As those of one branch: the channels of one tensor, with others between."""
    together = torch.cat([offset, torch.full_like(mask, float("nan")), mask], dim=1)
    return together[:, : offset.shape[1]], together[:, -mask.shape[1] :]


def the_same_for_all(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(t[:1].expand_as(t) for t in (offset, mask))


def in_rows_with_gaps(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.cat([t, t], dim=-1)[..., : t.shape[-1]] for t in (offset, mask))


LAYOUTS = [channels_last, predicted_together, the_same_for_all, in_rows_with_gaps]


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("memory", MEMORY, ids=str)
@pytest.mark.parametrize("problem", [Problem(5, 16, (7, 6), 6), VOLUME], ids=["2d", "volume"])
def test_offsets_may_have_any_strides(set_memory, problem, memory, layout, deterministic):
    set_memory(*memory)
    tensors = problem.tensors(torch.float64)
    laid_out = layout(tensors["offset"].detach(), tensors["mask"].detach())
    results = []
    for coordinates in (map(Tensor.contiguous, laid_out), laid_out):
        given = dict(zip(("offset", "mask"), (t.requires_grad_() for t in coordinates)))
        options = problem.arguments() | {"deterministic": deterministic}
        results.append(run(host_deform_conv, tensors | given, **options))
    for name, expected in results[0].items():
        assert largest_error(results[1][name], expected) <= TOLERANCE[torch.float64], name


def test_offsets_of_one_branch_are_not_copied(host_operators, set_memory):
    """They take no memory beside what contiguous ones take, where a copy would."""
    set_memory(10**8, 10**8)
    tensors = {n: t.detach() for n, t in Problem(3, 8, (9, 8), 8).tensors(torch.float32).items()}
    x, offset, weight, _, mask = (tensors[name] for name in NAMES)
    grad_output = torch.randn(3, 8, 9, 8)
    geometry = ([1, 1], [1, 1], [1, 1])

    def peaks(offset: Tensor, mask: Tensor) -> list[int]:
        forward = host_operators.deform_conv2d
        backward = host_operators.deform_conv2d_backward
        return [
            peak_bytes(forward, x, offset, weight, None, *geometry, mask),
            peak_bytes(backward, grad_output, x, offset, weight, *geometry, mask, [True] * 4),
        ]

    contiguous = peaks(offset, mask)
    assert peaks(*predicted_together(offset, mask)) == contiguous
    assert peaks(*in_rows_with_gaps(offset, mask)) > contiguous


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
