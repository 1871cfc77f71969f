"""Deformable convolutions on a GPU, for the tests that are run there."""

import contextlib

import pytest
import torch

from mmdcn.ops import _devices
from tests.ops.problems import NAMES, Problem, wide

MARKS = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.usefixtures("exact_float32"),
]

GIB = 2**30

# Vectors of channels and single ones, groups of weights and of offsets, layouts, and three
# dimensions; all in one chunk of columns.
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


def detached(problem: Problem, dtype: torch.dtype) -> list:
    """input, offset, weight, bias, mask on the GPU, as the compiled operator takes them."""
    dtypes = {"offset": wide(dtype), "mask": wide(dtype)}
    tensors = {n: t for n, t in problem.tensors(dtype, "cuda").items() if t is not None}
    tensors = {n: t.detach().to(dtypes.get(n, dtype)) for n, t in tensors.items()}
    return [tensors.get(name) for name in NAMES]


def operators_of(problem: Problem) -> tuple:
    """The compiled operator, that of the backward pass, and their geometry."""
    # The products are chosen at a device's first call, which is not one of the compiled operator.
    _devices.service(torch.device("cuda", 0))
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
