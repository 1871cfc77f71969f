"""The contract of operators: inputs at the edges of what they take, and errors beyond these."""

import numpy
import pytest
import torch
from torch import Tensor

from mmdcn import ops
from tests.ops.calls import Call
from tests.ops.contract import (
    BAD_NUMBERS,
    DTYPES,
    EVERY,
    assert_named,
    compare,
    gradients,
    variables,
)

# ----------------------------------------------------------------------------------- edges of input


@EVERY
@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 1e30])
def test_offsets_that_reach_nothing(call, dtype, value):
    """The sample is zero, and so is every gradient through it."""
    if dtype == torch.float16 and value == 1e30:
        value = 65504.0
    tensors = variables(call, dtype=dtype)
    name = "offset_mask" if "offset_mask" in tensors else "offset"
    with torch.no_grad():
        tensors[name].fill_(value)
    results = gradients(call.function, call, tensors)
    bias = tensors.get("bias")
    expected = torch.zeros_like(results.pop("output"))
    output = call.function(**tensors, **call.arguments)
    if bias is not None:
        expected = expected + bias.detach().view(-1, *[1] * (output.dim() - 2))
    assert torch.equal(output, expected)
    for name, gradient in results.items():
        if name != "bias":
            assert torch.count_nonzero(gradient) == 0, name


@EVERY
@DTYPES
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
def test_infinite_gradients_reach_nothing_through_samples_outside(call, dtype, channels_last):
    """Not even as infinity times a weight of zero."""
    tensors = variables(call, dtype=dtype)
    name = "offset_mask" if "offset_mask" in tensors else "offset"
    with torch.no_grad():
        tensors[name].fill_(6e4)
    if channels_last and tensors["input"].dim() == 4:
        given = tensors["input"].detach().contiguous(memory_format=torch.channels_last)
        tensors["input"] = given.requires_grad_()
    output = call.function(**tensors, **call.arguments)
    infinite = torch.full_like(output, float("inf"))
    (gradient,) = torch.autograd.grad(output, tensors["input"], infinite)
    assert torch.count_nonzero(gradient) == 0


@EVERY
@DTYPES
def test_empty_batch(call, dtype):
    tensors = variables(call, dtype=dtype, batch=0)
    results = gradients(call.function, call, tensors)
    assert results["output"].shape[0] == 0
    for name in call.differentiable():
        assert results[name].shape == tensors[name].shape
        assert torch.count_nonzero(results[name]) == 0, name
    leaves = [tensors[name] for name in call.differentiable()]
    output = call.function(**tensors, **call.arguments)
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)
    assert all(g is None or torch.count_nonzero(g) == 0 for g in second)


@EVERY
def test_no_pixels(call):
    """An input of height or length zero is refused by name, or sampled as zero everywhere."""
    tensors = call.tensors(torch.float32)
    side = 1 if call.name in ("dcnv3", "dcnv4") else 2
    tensors["input"] = tensors["input"].narrow(side, 0, 0)
    try:
        output = call.function(**tensors, **call.arguments)
    except ValueError as error:
        assert ": expected" in str(error)
    else:
        assert not output.any()


# ---------------------------------------------------------------------------------------- bad calls


def refused_or_right(call: Call, tensors: dict, arguments: dict) -> bool:
    """Whether the call is refused; if it is not, it must compute what the reference computes."""
    try:
        output = call.function(**tensors, **arguments)
    except Exception as error:
        assert_named(error, call)
        return True
    assert isinstance(output, Tensor)
    compare(output, call.reference(**tensors, **arguments))
    return False


@EVERY
def test_every_bad_shape_is_named(call):
    for name, tensor in call.tensors().items():
        refused = []
        for d in range(tensor.dim()):
            for size in {0, tensor.shape[d] - 1, tensor.shape[d] + 1, 7 * tensor.shape[d]}:
                index = torch.arange(size) % tensor.shape[d]
                changed = call.tensors() | {name: tensor.index_select(d, index)}
                refused.append(refused_or_right(call, changed, call.arguments))
        for changed in (tensor.unsqueeze(0), tensor.flatten(), tensor.sum()):
            if changed.dim() != tensor.dim():
                assert refused_or_right(call, call.tensors() | {name: changed}, call.arguments)
        assert any(refused), name


@EVERY
def test_every_bad_dtype_device_and_type_is_named(call):
    for name, tensor in call.tensors(torch.float32).items():
        for bad in (
            *(tensor.to(d) for d in (torch.int64, torch.bool, torch.complex64, torch.float64)),
            tensor.to("meta"),
            tensor.tolist(),
            "tensor",
            3,
        ):
            tensors = call.tensors(torch.float32) | {name: bad}
            with pytest.raises((TypeError, ValueError)) as caught:
                call.function(**tensors, **call.arguments)
            assert_named(caught.value, call)


@EVERY
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_every_bad_number_is_named(call, bad):
    tensors = call.tensors()
    for name in call.function.__annotations__:
        if name == "return" or name in tensors:
            continue
        arguments = call.arguments | {name: bad}
        try:
            output = call.function(**tensors, **arguments)
        except Exception as error:
            assert_named(error, call)
        else:
            assert isinstance(output, Tensor)


@EVERY
@pytest.mark.parametrize("number", [numpy.int64, torch.tensor], ids=["numpy", "torch"])
def test_numbers_may_be_of_other_types(call, number):
    """As sizes that somebody has computed are."""
    expected = call.function(**call.tensors(), **call.arguments)

    def converted(value):
        if isinstance(value, tuple):
            return tuple(map(converted, value))
        return number(value) if type(value) is int else value

    arguments = {name: converted(value) for name, value in call.arguments.items()}
    assert torch.equal(call.function(**call.tensors(), **arguments), expected)


@EVERY
def test_errors_reach_through_transforms(call):
    tensors = call.tensors()
    names = list(tensors)
    offset = names[1] if "rois" not in names else "offset"
    tensors[offset] = tensors[offset][:, :-1]
    with pytest.raises((TypeError, ValueError), match=f"^{offset}"):
        torch.func.jvp(
            call.on(call.function, names), tuple(tensors.values()), tuple(tensors.values())
        )


# What allocates more than any machine has: tensors of one element, seen through zero strides.
HUGE = 2**14


def seen_large(*shape: int) -> Tensor:
    return torch.zeros(1).expand(shape)


TOO_LARGE = {
    "deform_conv2d": lambda: ops.deform_conv2d(
        seen_large(HUGE, 1, HUGE, HUGE), seen_large(HUGE, 2, HUGE, HUGE), seen_large(HUGE, 1, 1, 1)
    ),
    "deform_conv1d": lambda: ops.deform_conv1d(
        seen_large(HUGE, 1, HUGE**2), seen_large(HUGE, 1, HUGE**2), seen_large(HUGE, 1, 1)
    ),
    "deform_conv3d": lambda: ops.deform_conv3d(
        seen_large(HUGE, 1, HUGE, HUGE, 1),
        seen_large(HUGE, 3, HUGE, HUGE, 1),
        seen_large(HUGE, 1, 1, 1, 1),
    ),
    "dcnv3": lambda: ops.dcnv3(
        seen_large(HUGE, HUGE, HUGE, 64),
        seen_large(HUGE, HUGE, HUGE, 2),
        seen_large(HUGE, HUGE, HUGE, 1),
        1,
    ),
    "dcnv4": lambda: ops.dcnv4(
        seen_large(HUGE, HUGE, HUGE, 64), seen_large(HUGE, HUGE, HUGE, 3), 1
    ),
    "deform_roi_pool": lambda: ops.deform_roi_pool(
        torch.zeros(1, HUGE, 2, 2), seen_large(2**26, 5), None, 64
    ),
}


def test_every_function_is_asked_for_too_much():
    assert set(TOO_LARGE) == set(ops.__all__)


@pytest.mark.parametrize("function", TOO_LARGE)
def test_failed_allocation_keeps_its_cause(function):
    """What was being done or torch's own message, and no line of ours that made the call."""
    with pytest.raises(RuntimeError) as caught:
        TOO_LARGE[function]()
    message = str(caught.value)
    assert "memory" in message and "bytes" in message, message
    assert "API call failed" not in message and ".h" not in message, message
