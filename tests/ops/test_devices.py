"""What computes on a device, for every operator; on the CPU, with our kernels switched off."""

import pytest
import torch
from torch import Tensor

from mmdcn.ops import _devices, reference
from mmdcn.ops._registration import OPERATORS
from tests.ops.calls import CALLS
from tests.ops.contract import EVERY, compare, gradients, variables
from tests.switched_off import SUBSTITUTES, Graphs, counting, switch_off

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# The calls that reach operators that mmcv has kernels for.
BY_MMCV = [n for n in CALLS if n.startswith(("deform_conv1d", "deform_conv2d"))]


def assert_right(call, dtype: torch.dtype = torch.float64) -> None:
    """Output and gradients are the reference's."""
    actual = gradients(call.function, call, variables(call, dtype=dtype))
    exact = {n: t.detach().double() for n, t in variables(call, dtype=dtype).items()}
    exact = {n: t.requires_grad_(n not in call.constant) for n, t in exact.items()}
    expected = gradients(call.reference, call, exact)
    for name, value in expected.items():
        assert actual[name].dtype == dtype, name
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 1.6e-2)
        error = (actual[name].double() - value).abs().max() / value.abs().max()
        assert error <= tolerance, (name, float(error))


def assert_right_in_graphs(call, monkeypatch, server: str) -> None:
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(call.function, backend=graphs)
    expected = gradients(call.reference, call, variables(call))
    with counting(monkeypatch, ours=False) as counts:
        compare(gradients(compiled, call, variables(call)), expected)
    assert counts == {server: 1}
    assert not graphs.ours


# ------------------------------------------------------------------------------- every operator


def test_every_operator_is_called():
    """By the calls that the tests below go through."""
    called = set()
    for call in CALLS.values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                _devices, "server", lambda name, device: called.add(name) or _devices.REFERENCE
            )
            switch_off(patch)
            call.function(**call.tensors(), **call.arguments)
    assert called == set(OPERATORS)


@EVERY
def test_our_kernels_serve_the_cpu(call, monkeypatch):
    with counting(monkeypatch) as counts:
        gradients(call.function, call, variables(call))
    assert counts == {"ours": 2}


@EVERY
@DTYPES
def test_the_reference_serves_other_devices(call, dtype, monkeypatch):
    switch_off(monkeypatch)
    with counting(monkeypatch) as counts:
        assert_right(call, dtype)
    assert {**counts} == {"ours": 0, "reference": 1}


@EVERY
def test_the_reference_takes_an_empty_batch(call, monkeypatch):
    switch_off(monkeypatch)
    results = gradients(call.function, call, variables(call, batch=0))
    assert results["output"].shape[0] == 0
    assert not any(results[name].any() for name in call.differentiable())


@EVERY
def test_the_reference_differentiates_twice(call, monkeypatch):
    switch_off(monkeypatch)
    second = []
    for function in (call.function, call.reference):
        tensors = variables(call)
        leaves = [tensors[name] for name in call.differentiable()]
        output = function(**tensors, **call.arguments)
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    compare(*second)


@EVERY
def test_the_reference_serves_what_is_compiled(call, monkeypatch):
    """Between two graphs."""
    switch_off(monkeypatch)
    assert_right_in_graphs(call, monkeypatch, "reference")


# ---------------------------------------------------------------------------------------- by mmcv


@pytest.mark.parametrize("name", BY_MMCV)
@DTYPES
def test_mmcv_serves_what_it_has_kernels_for(name, dtype, monkeypatch, mmcv_offered):
    switch_off(monkeypatch, *SUBSTITUTES)
    with counting(monkeypatch) as counts:
        assert_right(CALLS[name], dtype)
    assert {**counts} == {"ours": 0, "mmcv": 1}


@pytest.mark.parametrize("name", BY_MMCV)
def test_mmcv_serves_what_is_compiled(name, monkeypatch, mmcv_offered):
    """Between two graphs, as mmcv's own functions do."""
    switch_off(monkeypatch, *SUBSTITUTES)
    assert_right_in_graphs(CALLS[name], monkeypatch, "mmcv")


@pytest.mark.parametrize("name", [n for n in CALLS if n not in BY_MMCV and "roi" not in n])
def test_the_reference_serves_what_mmcv_has_no_kernels_for(name, monkeypatch, mmcv_offered):
    switch_off(monkeypatch, *SUBSTITUTES)
    with counting(monkeypatch) as counts:
        assert_right(CALLS[name])
    assert {**counts} == {"ours": 0, "reference": 1}


@pytest.mark.parametrize(
    "change, by_mmcv",
    [
        ({}, True),
        ({"offset": None}, True),
        ({"position_sensitive": True, "channels": 24}, False),
        ({"deform_groups": 2}, False),
        ({"rois": 0}, False),
    ],
    ids=str,
)
def test_roi_pooling_by_mmcv(change, by_mmcv, monkeypatch, mmcv_offered):
    """Only as it is in mmcv: one offset group, and not position-sensitive."""
    call = CALLS["deform_roi_pool"]
    number = change.get("rois", 3)
    tensors = call.tensors(batch=number)
    tensors["input"] = torch.randn(2, change.get("channels", 4), 7, 8, dtype=torch.float64)
    tensors["offset"] = tensors["offset"][:, : 2 * change.get("deform_groups", 1)]
    if "offset" in change:
        tensors["offset"] = None
    arguments = call.arguments | {"position_sensitive": change.get("position_sensitive", False)}
    expected = reference.deform_roi_pool(**tensors, **arguments)
    switch_off(monkeypatch, *SUBSTITUTES)
    with counting(monkeypatch) as counts:
        actual = call.function(**tensors, **arguments)
    compare(actual, expected)
    assert counts["mmcv"] == 1
    assert counts["reference"] == (not by_mmcv)


@pytest.mark.parametrize("batch", [1, 7, 32, 33, 66])
def test_any_batch_by_mmcv(batch, monkeypatch, mmcv_offered):
    """mmcv's v1 wants multiples of its im2col_step."""
    call = CALLS["deform_conv2d-v1"]
    switch_off(monkeypatch, *SUBSTITUTES)
    tensors = call.tensors(batch=batch)
    with counting(monkeypatch) as counts:
        actual = call.function(**tensors, **call.arguments)
    assert {**counts} == {"ours": 0, "mmcv": 1}
    compare(actual, call.reference(**tensors, **call.arguments))


@pytest.mark.parametrize("what", ["empty", "small image", "subclass", "deterministic"])
def test_calls_that_mmcv_does_not_take(what, monkeypatch, mmcv_offered):
    """An empty batch; an image smaller than the kernel; what is no plain tensor; in fixed order."""
    switch_off(monkeypatch, *SUBSTITUTES)
    call = CALLS["deform_conv2d-v1"]
    tensors, arguments = call.tensors(batch=0 if what == "empty" else 2), call.arguments
    if what == "small image":
        arguments = {"padding": 2}
        tensors |= {"input": tensors["input"][:, :, :2, :1]}
        tensors |= {"offset": torch.randn(2, 24, 4, 4, dtype=torch.float64)}
    if what == "subclass":
        tensors["input"] = tensors["input"].as_subclass(type("Subclass", (Tensor,), {}))
    if what == "deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with counting(monkeypatch) as counts:
        actual = call.function(**tensors, **arguments)
    assert counts["reference"] == 1
    compare(actual.as_subclass(Tensor), call.reference(**tensors, **arguments).as_subclass(Tensor))


@pytest.mark.parametrize("substitutes", [(), SUBSTITUTES], ids=["reference", "mmcv"])
@pytest.mark.parametrize("name", ["deform_conv2d-v1", "deform_conv2d-v2"])
def test_channels_last_is_kept(name, substitutes, monkeypatch, mmcv_offered):
    call = CALLS[name]
    switch_off(monkeypatch, *substitutes)
    tensors = call.tensors()
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    output = call.function(**tensors, **call.arguments)
    assert output.is_contiguous(memory_format=torch.channels_last)
    compare(output, call.reference(**tensors, **call.arguments))
