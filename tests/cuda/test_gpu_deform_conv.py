"""Deformable convolution on a GPU: against the reference and the CPU, and what CUDA programs ask.

``tools/gpu_check.sh`` runs these on a GPU machine, from an installed wheel.
"""

import contextlib
import dataclasses
import math
import random

import pytest
import torch
from torch.library import opcheck

from mmdcn.benchmark.gpu.accuracy import exact_sums, outside_one_rounding
from mmdcn.ops import _devices, _products, deform_conv2d, reference
from tests.ops.problems import (
    DTYPES,
    NAMES,
    TOLERANCE,
    Problem,
    assert_samples_nothing,
    compare,
    divisors,
    exact,
    largest_error,
    run,
    smallest_size,
    wide,
)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

GIB = 2**30

# Vectors of channels and single ones, groups of weights and of offsets, layouts, and three
# dimensions; more than one chunk of columns needs the larger shapes further down.
PROBLEMS = [
    Problem(2, 40, (20, 21), 24),
    Problem(1, 128, (50, 84), 128, channels_last=True),
    Problem(1, 128, (19, 18), 80, groups=2, deform_groups=4, has_bias=False),
    Problem(3, 96, (30, 17), 8, kernel=(5, 7), padding=(2, 3), stride=(2, 1), dilation=(1, 2)),
    Problem(2, 15, (33, 31), 21, groups=3, deform_groups=5, has_mask=False, spread=20.0),
    Problem(2, 32, (5, 9, 8), 24, groups=2, deform_groups=2),
    Problem(2, 7, (5, 9, 8), 5, kernel=(3, 1, 2), padding=(1, 0, 1), has_mask=False),
]
ONE_OF_EACH_RANK = [PROBLEMS[0], PROBLEMS[5]]
CANDIDATES = [
    (product, arithmetic, call)
    for product, arithmetics in _products.CALLS.items()
    for arithmetic, calls in arithmetics.items()
    for call in calls
]


@pytest.fixture(autouse=True)
def exact_float32():
    """Float32 is exact in these tests, unless they say otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture
def tf32(exact_float32):
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def random_problem(seed: int) -> Problem:
    draw = random.Random(seed)
    pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
    kernel, dilation, stride, padding = pair(1, 4), pair(1, 3), pair(1, 3), pair(0, 3)
    channels = draw.choice([1, 3, 4, 12, 17, 40, 64, 70, 130])
    groups = draw.choice(divisors(channels))
    return Problem(
        batch=draw.randint(1, 3),
        channels=channels,
        size=tuple(map(sum, zip(smallest_size(kernel, padding, dilation), pair(0, 20)))),
        out_channels=groups * draw.choice([1, 5, 33, 70] if groups < 8 else [1, 3]),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        deform_groups=draw.choice(divisors(channels)),
        has_mask=draw.random() < 0.5,
        has_bias=draw.random() < 0.5,
        channels_last=draw.random() < 0.5,
        float32_offset=draw.random() < 0.5,
        spread=draw.choice([0.3, 2.0, 20.0]),
        seed=seed,
    )


def detached(problem: Problem, dtype: torch.dtype) -> list:
    """input, offset, weight, bias, mask on the GPU, as the compiled operator takes them."""
    dtypes = {"offset": wide(dtype), "mask": wide(dtype)}
    tensors = {n: t for n, t in problem.tensors(dtype, "cuda").items() if t is not None}
    tensors = {n: t.detach().to(dtypes.get(n, dtype)) for n, t in tensors.items()}
    return [tensors.get(name) for name in NAMES]


def operators_of(problem: Problem) -> tuple:
    """The compiled operator, that of the backward pass, and their geometry."""
    name = "deform_conv2d" if problem.rank == 2 else "deform_conv_nd"
    geometry = [list(numbers) for numbers in problem.arguments().values()]
    operators = torch.ops.mmdcn
    return getattr(operators, name), getattr(operators, f"{name}_backward"), geometry


@contextlib.contextmanager
def needs_memory(gibibytes: int):
    """Skips where the GPU has less free memory; gives it back afterwards."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, {free:.0f} GiB are free")
    yield
    torch.cuda.empty_cache()


# ------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_matches_reference(dtype, seed):
    compare(random_problem(seed), dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 256, "out_channels": 256, "size": (50, 84)},
        {"channels": 64, "out_channels": 128, "size": (25, 42), "deform_groups": 64},
        {"channels": 64, "out_channels": 64, "size": (25, 42), "groups": 64},
        {"channels": 3, "out_channels": 64, "size": (60, 61), "kernel": (7, 7)},
    ],
    ids=lambda sizes: "-".join(map(str, sizes.values())),
)
def test_matches_cpu_on_real_sizes(dtype, channels_last, sizes):
    problem = Problem(batch=2, channels_last=channels_last, **sizes)
    shape = (2, problem.out_channels, *problem.out_size)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = [
        run(deform_conv2d, problem.tensors(dtype, device), grad_output, **problem.arguments())
        for device in ("cuda", "cpu")
    ]
    for name, expected in results[1].items():
        assert results[0][name].device.type == "cuda"
        error = largest_error(results[0][name], expected)
        assert error <= 2 * TOLERANCE[dtype], f"{name}: error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_path_matches_reference(dtype, problem):
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_tf32_matches_reference(tf32, problem):
    compare(problem, torch.float32, device="cuda", tolerance=1e-3)


# ------------------------------------------------------------------------------ torch's products


@pytest.fixture
def product_by():
    """``product_by(product, arithmetic, call)`` has a call compute a product during the test."""
    device = torch.device("cuda", 0)
    # The first call on a device chooses them, which must not come later.
    assert _devices.service(device).kernels, _devices.describe(device)
    before = _products.chosen(device)

    def choose(product: str, arithmetic: str, call: str) -> None:
        torch.ops.mmdcn.set_cuda_product(0, product, arithmetic, call)

    yield choose
    for key, call in before.items():
        choose(*key, call)


@pytest.mark.parametrize("product, arithmetic, call", CANDIDATES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_every_call_of_a_product_matches_reference(
    product_by, request, problem, product, arithmetic, call
):
    """One that is not chosen may be refused by torch; none may be wrong."""
    in_force = torch.ops.mmdcn.cuda_product(0, product, arithmetic) == call
    last = call == _products.CALLS[product][arithmetic][-1]
    product_by(product, arithmetic, call)
    tolerance = None
    if arithmetic == "tf32":
        request.getfixturevalue("tf32")
        tolerance = 1e-3
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    try:
        compare(problem, dtype, device="cuda", tolerance=tolerance)
    except RuntimeError as error:
        if in_force or last:
            raise
        pytest.skip(f"torch does not compute it: {str(error).splitlines()[0]}")


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_float32_is_exact_whatever_torch_allows_products_of_matrices(problem, setting):
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        compare(problem, torch.float32, device="cuda")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels, size", [(512, (25, 42)), (128, (100, 168))])
def test_half_types_add_up_in_float32(dtype, channels, size):
    """Sums of the same columns in float64, rounded once, are next to all within one rounding."""
    problem = Problem(1, channels, size, channels, has_bias=False, float32_offset=True)
    leaves = {n: t for n, t in problem.tensors(dtype, "cuda").items() if t is not None}
    output = deform_conv2d(**leaves, padding=1)
    grad_output = torch.randn(output.shape, device="cuda").to(dtype)
    output.backward(grad_output)
    for product, actual in (("output", output.detach()), ("grad_weight", leaves["weight"].grad)):
        share = outside_one_rounding(actual, exact_sums(leaves, grad_output, product))
        assert share <= 1e-3, f"{product}: {share:.2%}"


@pytest.mark.parametrize("has_mask", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("groups, deform_groups", [(1, 1), (2, 4), (2, 1)])
def test_gradcheck(has_mask, groups, deform_groups):
    problem = Problem(
        *(2, 4, (5, 4), 4, (2, 3), (2, 1), (1, 1), (1, 1)), groups, deform_groups, has_mask
    )
    tensors = problem.tensors(device="cuda")
    with torch.no_grad():  # Away from integer coordinates, where the derivative jumps.
        tensors["offset"].copy_(torch.rand_like(tensors["offset"]) * 0.8 + 0.1)
    names = [name for name, t in tensors.items() if t is not None]

    def call(*values):
        return deform_conv2d(**dict(zip(names, values)), **problem.arguments())

    # grad_input is added up in no fixed order.
    variables = [tensors[name] for name in names]
    assert torch.autograd.gradcheck(call, variables, nondet_tol=1e-12)


# ---------------------------------------------------------------------------- decided semantics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, 1e30, -1e30])
def test_offsets_that_reach_nothing(dtype, value):
    tensors = Problem(out_channels=3, float32_offset=True).tensors(dtype, "cuda")
    with torch.no_grad():
        tensors["offset"].fill_(value)
    assert_samples_nothing(deform_conv2d, tensors, padding=1)


def test_one_bad_offset_leaves_the_others_alone():
    tensors = Problem().tensors(device="cuda")
    with torch.no_grad():
        tensors["offset"][0, 3, 2, 2] = float("nan")
    actual = run(deform_conv2d, tensors, padding=1)
    expected = run(reference.deform_conv2d, exact(tensors), padding=1)
    for name, value in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        assert largest_error(actual[name], value) < 1e-12, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype):
    tensors = Problem(batch=0).tensors(dtype, "cuda")
    results = run(deform_conv2d, tensors, padding=1)
    assert results["output"].shape == (0, 6, 7, 8)
    for name in NAMES:
        assert results[f"grad_{name}"].shape == tensors[name].shape
        assert torch.count_nonzero(results[f"grad_{name}"]) == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_kept(channels_last):
    tensors = Problem(channels_last=channels_last).tensors(torch.float16, "cuda")
    output = deform_conv2d(**tensors, padding=1)
    output.sum().backward()
    for tensor in (output, tensors["input"].grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
        assert tensor.is_contiguous() != channels_last


def test_arguments_need_not_be_contiguous():
    expected = run(deform_conv2d, Problem().tensors(device="cuda"), padding=1)
    tensors = {}
    for name, tensor in Problem().tensors(device="cuda").items():
        pairs = torch.stack([tensor.detach(), torch.full_like(tensor, float("nan"))], dim=-1)
        tensors[name] = pairs[..., 0].requires_grad_()
    actual = run(deform_conv2d, tensors, padding=1)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.parametrize("wanted", NAMES)
def test_each_gradient_alone(wanted):
    problem = Problem(1, 40, (6, 5), 6)
    expected = run(deform_conv2d, problem.tensors(device="cuda"), padding=1)
    tensors = problem.tensors(device="cuda")
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    actual = run(deform_conv2d, tensors, padding=1)
    error = largest_error(actual[f"grad_{wanted}"], expected[f"grad_{wanted}"])
    assert error <= TOLERANCE[torch.float64]
    assert actual.keys() == {"output", f"grad_{wanted}"}


def test_input_of_more_than_2_31_elements():
    """The last channels of the last image are read, and their gradients written, where they lie."""
    channels, size = 4, 24_000  # 2.3e9 elements
    with needs_memory(40):
        x = torch.zeros(1, channels, size, size, dtype=torch.float16, device="cuda")
        x[0, -1, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device="cuda")
        x.requires_grad_()
        weight = torch.ones(1, channels, 1, 1, dtype=torch.float16, device="cuda")
        weight.requires_grad_()
        offset = torch.full((1, 2, 2, 2), -0.5, device="cuda", requires_grad=True)
        output = deform_conv2d(x, offset, weight, stride=size - 1)
        assert output[0, 0, 1, 1].item() == 2.5
        output.sum().backward()
        assert weight.grad.flatten().tolist() == [0, 0, 0, 2.5]
        assert offset.grad[0, :, 1, 1].tolist() == [2.0, 1.0]
        assert x.grad[0, -1, -2:, -2:].tolist() == [[0.25, 0.25], [0.25, 0.25]]


def test_output_of_more_than_2_31_elements():
    size = 46_400  # 2.15e9 output pixels, and twice as many offsets
    with needs_memory(64):
        x = torch.ones(1, 1, size, size, dtype=torch.float16, device="cuda")
        x[0, 0, -1, -1] = 3.0
        weight = torch.ones(1, 1, 1, 1, dtype=torch.float16, device="cuda")
        offset = torch.zeros(1, 2, size, size, device="cuda")
        offset[0, 1, -1, -2] = 0.5
        offset[0, 0, 0, 0] = float("nan")
        offset.requires_grad_()
        output = deform_conv2d(x, offset, weight)
        assert output[0, 0, 0, :2].tolist() == [0.0, 1.0]
        assert output[0, 0, -1, -3:].tolist() == [1.0, 2.0, 3.0]
        grad_output = torch.ones(1, 1, 1, 1, dtype=torch.float16, device="cuda")
        output.backward(grad_output.expand_as(output))
        assert offset.grad[0, 1, -1, -2].item() == 2.0
        assert offset.grad[0, :, 0, 0].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------------- contract with torch, CUDA


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


@pytest.fixture
def deterministic_algorithms(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


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
def test_cuda_graph(problem, dtype, deterministic):
    """Forward and backward are captured, and replayed on other values."""
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
    """64 MB, the packed weight, and one image's copies and sum of its input's gradient."""
    weight = problem.out_channels * problem.channels // problem.groups * math.prod(problem.kernel)
    features = problem.channels * math.prod(problem.size)
    outputs = problem.out_channels * math.prod(problem.out_size)
    # The weight's gradient is added up in float32, one part after the other.
    packed = weight * (dtype.itemsize + 2 * 4)
    image = (features + outputs) * dtype.itemsize + features * (4 + (8 if deterministic else 0))
    return 64 * 10**6 + packed + image


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
