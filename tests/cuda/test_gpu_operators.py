"""The operators but deform_conv2d on a GPU: against the reference, and what CUDA programs ask."""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from tests.cuda.gpu import MARKS
from tests.ops.aggregate_problems import AggregateProblem
from tests.ops.problems import DTYPES, TOLERANCE, VOLUME, Problem, compare, divisors, run, wide
from tests.ops.roi_problems import RoIProblem

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(15))
def test_roi_pool_matches_reference(dtype, seed):
    draw = random.Random(seed)
    channels = draw.choice([1, 6, 17, 70, 130])
    problem = RoIProblem(
        batch=draw.randint(1, 3),
        channels=channels,
        size=(draw.randint(1, 30), draw.randint(1, 30)),
        rois=draw.randint(1, 20),
        output_size=(draw.choice([1, 2, 4]), draw.choice([1, 2, 4])),
        sampling_ratio=draw.choice([0, 1, 2, 16]),
        deform_groups=draw.choice([0, *divisors(channels)]),
        position_sensitive=draw.random() < 0.3,
        channels_last=draw.random() < 0.5,
        float32_offset=draw.random() < 0.5,
        seed=seed,
    )
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(15))
def test_aggregate_matches_reference(dtype, seed):
    draw = random.Random(seed)
    channels = draw.choice([1, 6, 17, 64, 130])
    kernel = draw.choice([(3, 3), (1, 5), (7, 7)])
    problem = AggregateProblem(
        batch=draw.randint(1, 3),
        channels=channels,
        size=(draw.randint(7, 25), draw.randint(7, 25)),
        kernel=kernel,
        stride=(draw.randint(1, 2), draw.randint(1, 2)),
        padding=(draw.randint(0, 3), draw.randint(0, 3)),
        group=draw.choice(divisors(channels)),
        offset_scale=draw.choice([0.5, 1.0]),
        remove_center=draw.random() < 0.5,
        float32_offset=draw.random() < 0.5,
        seed=seed,
    )
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_conv_nd_matches_reference(dtype, rank, seed):
    draw = random.Random(seed)
    each = lambda low, high: tuple(draw.randint(low, high) for _ in range(rank))  # noqa: E731
    channels = draw.choice([1, 6, 36, 70, 130])
    groups = draw.choice(divisors(channels))
    problem = Problem(
        size=each(6, 9),
        batch=draw.randint(1, 3),
        channels=channels,
        out_channels=groups * draw.choice([1, 3] if groups > 3 else [5, 70]),
        kernel=each(1, 3),
        stride=each(1, 2),
        padding=each(0, 2),
        dilation=each(1, 2),
        groups=groups,
        deform_groups=draw.choice(divisors(channels)),
        has_mask=draw.random() < 0.5,
        has_bias=draw.random() < 0.5,
        float32_offset=draw.random() < 0.5,
        seed=seed,
    )
    compare(problem, dtype, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    # grad_input is added up in no fixed order.
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
    x, rois, offset = RoIProblem().tensors(dtype, "cuda").values()
    arguments = (x, rois.to(wide(dtype)), offset.detach().to(wide(dtype)).requires_grad_())
    arguments += ([2, 4], 0.25, 2, 0.5, False)
    opcheck(torch.ops.mmdcn.deform_roi_pool, arguments, **close)
    x, offset, mask = AggregateProblem().tensors(dtype, "cuda").values()
    points = [
        t.detach().to(wide(dtype)).unflatten(3, (2, -1)).requires_grad_() for t in (offset, mask)
    ]
    arguments = (x, *points, [3, 3], [1, 1], [1, 1], [1, 1], 1.0, False)
    opcheck(torch.ops.mmdcn.deform_aggregate, arguments, **close)
    x, offset, weight, bias, mask = VOLUME.tensors(dtype, "cuda").values()
    offset, mask = (t.detach().to(wide(dtype)).requires_grad_() for t in (offset, mask))
    arguments = (x, offset, weight, bias, [1] * 3, [1] * 3, [1] * 3, mask)
    opcheck(torch.ops.mmdcn.deform_conv_nd, arguments, **close)


def test_all_but_grad_input_are_deterministic():
    roi, aggregate = RoIProblem(channels=130, rois=50), AggregateProblem(channels=130)
    for problem in (roi, aggregate, VOLUME):
        first, second = (
            run(problem.function, problem.tensors(torch.float32, "cuda"), **problem.arguments())
            for _ in range(2)
        )
        for name in first:
            if name != "grad_input":
                assert torch.equal(first[name], second[name]), name


def test_host_is_not_synchronised():
    for problem in (RoIProblem(), AggregateProblem(), VOLUME):
        tensors = problem.tensors(torch.float32, "cuda")
        grad_output = torch.ones(problem.out_shape, device="cuda")
        run(problem.function, tensors, grad_output, **problem.arguments())
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(problem.function, tensors, grad_output, **problem.arguments())
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_images_that_do_not_exist_stop_the_program():
    """In a process of its own: what a device-side assertion leaves behind is of no use."""
    code = """
import torch
from mmdcn.ops import deform_roi_pool
rois = torch.tensor([[2.0, 0, 0, 4, 4]], device="cuda")
deform_roi_pool(torch.zeros(2, 3, 8, 8, device="cuda"), rois, None, 2)
torch.cuda.synchronize()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "image_of_roi_exists" in done.stderr
    assert "device-side assert" in done.stderr
