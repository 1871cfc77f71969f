"""What the tests of the operators' contract share: its calls as parameters, and their gradients."""

import pytest
import torch
from torch import Tensor

from tests.ops.calls import CALLS, Call
from tests.ops.problems import TOLERANCE

EVERY = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def compare(actual, expected, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def variables(call: Call, **settings) -> dict[str, Tensor]:
    """The tensors; those that can be differentiated for are leaves that require gradients."""
    tensors = call.tensors(**settings)
    return {n: t.requires_grad_(n not in call.constant) for n, t in tensors.items()}


def of_differentiable(call: Call, function):
    """The function of its differentiable tensors by position, and their values."""
    tensors = call.tensors()
    fixed = {n: t for n, t in tensors.items() if n in call.constant}
    names = call.differentiable()

    def compute(*values):
        return function(**dict(zip(names, values)), **fixed, **call.arguments)

    return compute, tuple(tensors[name] for name in names)


def gradients(function, call: Call, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    output = function(**tensors, **call.arguments)
    names = [n for n, t in tensors.items() if t.requires_grad]
    grad_output = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
    computed = torch.autograd.grad(output, [tensors[n] for n in names], grad_output)
    return {"output": output.detach(), **dict(zip(names, computed))}
