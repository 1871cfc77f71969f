"""The compiled operators called directly, past the checks of the functions in mmdcn.ops."""

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn.ops._registration import OPERATORS
from tests.ops.calls import CALLS
from tests.ops.contract import variables

ERRORS = (RuntimeError, TypeError, ValueError)


class Recorder(TorchDispatchMode):
    """Keeps the compiled operators' calls, by the names of their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[torch._ops.OpOverload, dict] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mmdcn":
            values = (a.detach() if isinstance(a, Tensor) else a for a in args)
            names = (argument.name for argument in function._schema.arguments)
            self.calls[function] = dict(zip(names, values))
        return function(*args, **(kwargs or {}))


@functools.cache
def recorded() -> dict[torch._ops.OpOverload, dict]:
    """A good call of every compiled operator, forward and backward, in float32."""
    with Recorder() as recorder:
        for call in CALLS.values():
            tensors = variables(call, dtype=torch.float32)
            call.function(**tensors, **call.arguments).sum().backward()
    for arguments in recorder.calls.values():
        if "rois" in arguments:
            arguments["rois"][:, 0] = 0  # No number of an image tells how many there must be.
    return recorder.calls


OVERLOADS = [o for operator in OPERATORS.values() for o in (operator.forward, operator.backward)]
EVERY = pytest.mark.parametrize("operator", OVERLOADS, ids=lambda operator: operator.name())


def on_meta(arguments: dict) -> dict:
    return {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in arguments.items()}


def outcome(operator, arguments: dict) -> tuple | None:
    """Shapes and dtypes of the results; None where the call is refused and names an argument."""
    try:
        results = operator(*arguments.values())
    except ERRORS as error:
        assert any(name in str(error) for name in arguments), error
        return None
    results = (results,) if isinstance(results, Tensor) else results
    return tuple((result.shape, result.dtype) for result in results)


def test_every_operator_is_called():
    assert set(recorded()) == set(OVERLOADS)


@EVERY
def test_tensors_on_another_device_are_refused_by_name(operator):
    """The kernels for tensors without values would return memory that nobody has written to."""
    arguments = recorded()[operator]
    operator(*arguments.values())
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            bad = arguments | {name: value.to("meta")}
            pattern = r"\w+: expected device" if name == "input" else rf"{name}: expected device"
            with pytest.raises(ValueError, match=f"^{pattern}"):
                operator(*bad.values())


@EVERY
def test_what_does_not_fit_is_refused_with_values_and_without(operator):
    """The same calls on the CPU and on the meta device."""
    good = recorded()[operator]
    assert outcome(operator, good) == outcome(operator, on_meta(good)) is not None
    refused = 0
    for name, value in good.items():
        if isinstance(value, Tensor):
            changed = [value.narrow(d, 0, value.shape[d] - 1) for d in range(value.dim())]
            changed += [value[0], value.unsqueeze(0), value.double(), value.half(), value.long()]
        elif isinstance(value, (list, tuple)) and isinstance(value[0], int) and "mask" not in name:
            changed = [[n, *value[1:]] for n in (0, -1, value[0] + 1, 2**31, 2**62)]
            changed += [[*value, 1]]
        else:
            continue
        for bad in changed:
            arguments = good | {name: bad}
            outcomes = outcome(operator, arguments), outcome(operator, on_meta(arguments))
            assert outcomes[0] == outcomes[1], (name, bad if isinstance(bad, list) else bad.shape)
            refused += outcomes[0] is None
    assert refused > 10


@pytest.mark.parametrize("name", CALLS)
def test_gradients_that_nobody_wants_are_not_computed(name):
    """Of each tensor alone, and of all. A bias's is none of the kernels'."""
    call = CALLS[name]
    names = call.differentiable()
    for wanted in [*([n] for n in names), names]:
        tensors = call.tensors(dtype=torch.float32)
        for each in wanted:
            tensors[each].requires_grad_()
        with Recorder() as recorder:
            call.function(**tensors, **call.arguments).sum().backward()
        computed = set()
        for operator in OPERATORS.values():
            mask = recorder.calls.get(operator.backward, {}).get("output_mask", [])
            computed |= {n for n, is_wanted in zip(operator.gradients, mask) if is_wanted}
        # DCNv4's function takes both in one tensor.
        kernels = {part for n in wanted for part in n.split("_")} - {"bias"}
        assert computed == kernels, wanted
