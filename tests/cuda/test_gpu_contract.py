"""Deformable convolutions on a GPU: what torch and CUDA programs ask of an operator."""

import dataclasses
import math

import pytest
import torch
from torch.library import opcheck

from mmdcn.ops import deform_conv2d
from tests.cuda.gpu import MARKS, ONE_OF_EACH_RANK, PROBLEMS, detached, needs_memory, operators_of
from tests.ops.problems import DTYPES, TOLERANCE, Problem, compare, largest_error, run

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_opcheck(dtype, has_mask, channels_last):
    values = detached(Problem(has_mask=has_mask, channels_last=channels_last), dtype)
    leaves = [None if t is None else t.requires_grad_() for t in values]
    x, offset, weight, bias, mask = leaves
    geometry = ([1, 1], [1, 1], [1, 1])
    # grad_input is added up in no fixed order.
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    opcheck(torch.ops.mmdcn.deform_conv2d, (x, offset, weight, bias, *geometry, mask), **close)

    x, offset, weight, mask = (None if t is None else t.detach() for t in (x, offset, weight, mask))
    grad_output = torch.randn(2, 6, 7, 8, device="cuda").to(dtype)
    for wanted in ([True] * 4, [True, False, False, True], [False, True, True, False]):
        arguments = (grad_output, x, offset, weight, *geometry, mask, wanted)
        opcheck(torch.ops.mmdcn.deform_conv2d_backward, arguments, **close)


def test_autocast():
    tensors = Problem().tensors(torch.float32, "cuda")
    with torch.autocast("cuda", torch.float16):
        output = deform_conv2d(**tensors, padding=1)
    assert output.dtype == torch.float16
    output.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors.values())


def test_all_but_grad_input_are_deterministic():
    problem = Problem(2, 130, (40, 41), 70, deform_groups=2)
    first, second = (
        run(deform_conv2d, problem.tensors(torch.float32, "cuda"), padding=1) for _ in range(2)
    )
    for name in first:
        if name != "grad_input":
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_all_are_deterministic_where_torch_is(deterministic_algorithms, tf32, dtype, problem):
    results = [
        run(problem.function, problem.tensors(dtype, "cuda"), **problem.arguments())
        for _ in range(5)
    ]
    for name, value in results[0].items():
        assert all(torch.equal(other[name], value) for other in results[1:]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_deterministic_gradients_match_reference(deterministic_algorithms, dtype, problem):
    # In fixed point sums have fewer bits than in float64.
    tolerance = {**TOLERANCE, torch.float64: 1e-9}[dtype]
    compare(problem, dtype, device="cuda", tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("problem", ONE_OF_EACH_RANK, ids=str)
def test_current_stream_is_used(tf32, problem, dtype):
    """Work queued on another stream before the call is waited for, without any synchronisation."""
    tensors = problem.tensors(dtype, "cuda")
    expected = run(problem.function, tensors, **problem.arguments())
    late = {name: torch.full_like(t, float("nan")) for name, t in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for name, tensor in late.items():
            tensor.copy_(tensors[name].detach(), non_blocking=True)
        late = {name: t.requires_grad_() for name, t in late.items()}
        actual = run(problem.function, late, **problem.arguments())
    stream.synchronize()
    for name, value in expected.items():
        # Everything is the same but for the order in which the input's gradient is added up.
        assert largest_error(actual[name], value.double().cpu()) <= TOLERANCE[dtype], name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_current_device_need_not_be_the_tensors():
    expected = run(deform_conv2d, Problem().tensors(torch.float32, "cuda:0"), padding=1)
    with torch.cuda.device(0):
        actual = run(deform_conv2d, Problem().tensors(torch.float32, "cuda:1"), padding=1)
        assert torch.cuda.current_device() == 0
    for name, value in expected.items():
        assert actual[name].device.index == 1
        torch.testing.assert_close(actual[name].cpu(), value.cpu(), msg=name)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("problem", ONE_OF_EACH_RANK, ids=str)
def test_host_is_not_synchronised(request, problem, deterministic):
    if deterministic:
        request.getfixturevalue("deterministic_algorithms")
    tensors = problem.tensors(torch.float16, "cuda")
    grad_output = torch.ones(problem.out_shape, dtype=torch.float16, device="cuda")
    # A process's first calls wait while CUDA and torch's libraries load and allocate: not only the
    # first, as on an H200 the second did once.
    for _ in range(2):
        run(problem.function, tensors, grad_output, padding=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # The GPU is still asleep when everything has been queued.
        torch.cuda._sleep(1_000_000_000)
        asleep = torch.cuda.Event()
        asleep.record()
        run(problem.function, tensors, grad_output, padding=1)
        assert not asleep.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_cuda_graph(request, problem, dtype, deterministic):
    """Forward and backward are captured, and replayed on other values."""
    if deterministic:  # cuDNN follows torch's setting, and not our argument
        request.getfixturevalue("deterministic_algorithms")
    x, offset, weight, bias, mask = detached(problem, dtype)
    forward, backward, geometry = operators_of(problem)
    grad_output = torch.randn(problem.out_shape, device="cuda").to(dtype)

    def call():
        output = forward(x, offset, weight, bias, *geometry, mask, allow_tf32=True)
        return output, *backward(
            *(grad_output, x, offset, weight, *geometry, mask, [True] * 4),
            allow_tf32=True,
            deterministic=deterministic,
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()

    others = detached(dataclasses.replace(problem, seed=1), dtype)
    for tensor, other in zip((x, offset, weight, bias, mask), others):
        if tensor is not None:
            tensor.copy_(other)
    graph.replay()
    for actual, expected in zip(captured, call()):
        if deterministic:
            assert torch.equal(actual, expected)
        assert largest_error(actual, expected) <= TOLERANCE[dtype]


def allowed_bytes(problem: Problem, dtype: torch.dtype, deterministic: bool) -> int:
    """136 MB, the packed weight, and one image's copies and sum of its input's gradient."""
    weight = problem.out_channels * problem.channels // problem.groups * math.prod(problem.kernel)
    features = problem.channels * math.prod(problem.size)
    outputs = problem.out_channels * math.prod(problem.out_size)
    # The weight's gradient is added up in float32, one part after the other.
    packed = weight * (dtype.itemsize + 2 * 4)
    image = (features + outputs) * dtype.itemsize + features * (4 + (8 if deterministic else 0))
    return 136 * 10**6 + packed + image


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 128, (100, 168), 128), (32, 128, (100, 168), 128), (2, 256, (200, 334), 256)]
    + [(8, 32, (16, 56, 56), 32)],
    ids=str,
)
def test_memory_is_bounded_at_any_batch(dtype, channels_last, deterministic, sizes):
    problem = Problem(*sizes, channels_last=channels_last, float32_offset=True)
    with needs_memory(12):
        x, offset, weight, bias, mask = detached(problem, dtype)
        forward, backward, geometry = operators_of(problem)
        grad_output = torch.randn(problem.out_shape, device="cuda").to(x)

        def extra(call) -> int:
            call()  # after which torch and its libraries have what they keep
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            results = call()
            torch.cuda.synchronize()
            results = results if isinstance(results, tuple) else (results,)
            out = sum(t.numel() * t.element_size() for t in results)
            return torch.cuda.max_memory_allocated() - before - out

        allowed = allowed_bytes(problem, dtype, deterministic)
        calls = {
            "forward": lambda: forward(x, offset, weight, bias, *geometry, mask, allow_tf32=True),
            "backward": lambda: backward(
                *(grad_output, x, offset, weight, *geometry, mask, [True] * 4),
                allow_tf32=True,
                deterministic=deterministic,
            ),
        }
        for name, call in calls.items():
            taken = extra(call)
            assert taken <= allowed, f"{name}: {taken / 1e6:.1f} MB of {allowed / 1e6:.1f} MB"
