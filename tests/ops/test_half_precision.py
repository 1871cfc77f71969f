"""Errors in half precision: none larger than those of a dense convolution in the same type."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcn.ops import reference
from tests.ops.contract import HALVES
from tests.ops.problems import Problem, exact, run

DENSE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Of two results that are both rounded once, the errors differ by chance.
CHANCE = 1.05

PROBLEMS = [
    Problem(2, 70, (300,), out_channels=40),
    Problem(1, 64, (17, 19), out_channels=96),
    Problem(2, 70, (15, 16), out_channels=33, channels_last=True, weight_channels_last=True),
    Problem(1, 16, (5, 8, 9), out_channels=24),
]
EVERY_RANK = pytest.mark.parametrize(
    "problem", PROBLEMS, ids=["1d", "2d", "2d channels-last", "3d"]
)


def error(actual: Tensor, expected: Tensor) -> float:
    """The root of the mean square of the error, relative to that of what is expected."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def assert_no_worse(ours: dict, dense: dict, expected: dict) -> None:
    for name, value in dense.items():
        our_error, its_error = error(ours[name], expected[name]), error(value, expected[name])
        assert our_error <= CHANCE * its_error, f"{name}: {our_error:.2e}, dense {its_error:.2e}"


def grad_output_of(problem: Problem, dtype: torch.dtype) -> Tensor:
    return torch.randn(problem.out_shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@HALVES
@EVERY_RANK
def test_without_offsets(problem, dtype):
    tensors = problem.tensors(dtype)
    with torch.no_grad():
        tensors["offset"].zero_()
    tensors["mask"] = None
    dense = {name: tensors[name].detach().requires_grad_() for name in ("input", "weight", "bias")}
    arguments, grad = problem.arguments(), grad_output_of(problem, dtype)
    assert_no_worse(
        run(problem.function, tensors, grad, **arguments),
        run(DENSE[problem.rank], dense, grad, **arguments),
        run(reference.deform_conv_nd, exact(tensors), grad.double(), **arguments),
    )


def unfolded(problem: Problem, tensors: dict, grad_output: Tensor) -> dict:
    """Output and gradients as a dense convolution gives them, from exact samples that are rounded
    to its type, and exact gradients of the samples' gradients, which it has rounded."""
    weight, bias = (tensors[name].detach().requires_grad_() for name in ("weight", "bias"))
    leaves = exact({name: tensors[name] for name in ("input", "offset", "mask")})
    columns = weight[0].numel()
    one_hot = torch.eye(columns, dtype=torch.float64).view(columns, *weight.shape[1:])
    samples = reference.deform_conv_nd(**leaves, weight=one_hot, **problem.arguments())
    inputs = samples.detach().to(weight.dtype).requires_grad_()
    flat = weight.reshape(len(weight), columns, *[1] * problem.rank)
    output = DENSE[problem.rank](inputs, flat, bias)
    output.backward(grad_output)
    samples.backward(inputs.grad.double())
    results = {"output": output.detach(), "grad_weight": weight.grad, "grad_bias": bias.grad}
    return results | {f"grad_{name}": t.grad.to(tensors[name].dtype) for name, t in leaves.items()}


@HALVES
@EVERY_RANK
def test_with_offsets(problem, dtype):
    tensors = problem.tensors(dtype)
    grad = grad_output_of(problem, dtype)
    assert_no_worse(
        run(problem.function, tensors, grad, **problem.arguments()),
        unfolded(problem, tensors, grad),
        run(reference.deform_conv_nd, exact(tensors), grad.double(), **problem.arguments()),
    )
