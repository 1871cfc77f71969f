"""What the tests of the operators' contract share: its calls as parameters, their gradients, the
calls of compiled operators, and bad numbers."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


# --------------------------------------------------------------------------- the compiled operators


class Recorder(TorchDispatchMode):
    """Collects the calls of our compiled operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmdcn":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def compiled_calls(call: Call) -> list[tuple]:
    """What a forward and a backward pass call, with tensors that can be differentiated for."""
    with Recorder() as recorder:
        gradients(call.function, call, variables(call))
    return [
        (
            overload,
            [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments],
            options,
        )
        for overload, arguments, options in recorder.calls
    ]


# ---------------------------------------------------------------------------------------- bad calls

BAD_NUMBERS = [0, -1, 1.5, "1", None, True, [], (1,) * 5, (1, -1), (1, "1"), 2**31, 2**62, 2**70]
BAD_NUMBERS += [-(2**70), float("nan"), float("inf"), 1j, torch.tensor([1, 2]), torch.zeros(2, 2)]


def assert_named(error: Exception, call: Call) -> None:
    """The message begins with an argument, and says what was expected and what came."""
    message = str(error)
    if "rois: expected in column 0" in message:
        return  # numbers in a tensor, which the compiled operator looks at
    argument = message.split(":")[0].split(".")[0]
    assert isinstance(error, (TypeError, ValueError)), repr(error)
    assert argument in (*call.tensors(), *call.function.__annotations__), message
    assert "got" in message and ("expected" in message or "must" in message), message
