"""The choice of the calls that compute the products, with the host's build of the operators."""

import logging

import pytest
import torch

from mmdcn.ops import _devices, _products
from tests.cuda.stand_ins import stand_ins

CPU = torch.device("cpu")
BEST = {
    (product, arithmetic): calls[0]
    for product, arithmetics in _products.CALLS.items()
    for arithmetic, calls in arithmetics.items()
}


@pytest.fixture(autouse=True)
def host(host_operators, set_memory, monkeypatch):
    """The calls are chosen for the host's operators, and are as they were afterwards."""
    set_memory(3000, 3000)
    monkeypatch.setattr(_products, "_OPERATORS", host_operators)
    yield
    for product, arithmetics in _products.CALLS.items():
        for arithmetic in arithmetics:
            host_operators.set_cuda_product(-1, product, arithmetic, "matmul")


def test_the_best_calls_are_chosen_where_they_work():
    with stand_ins():
        assert _products.choose(CPU) == _products.chosen(CPU)
    assert _products.chosen(CPU) == BEST


def test_calls_that_fail_are_not_chosen(caplog):
    """The CPU has neither cuDNN nor products of another type than their operands'."""
    with caplog.at_level(logging.INFO, "mmdcn"):
        chosen = _products.choose(CPU)
    assert set(chosen.values()) == {"matmul", "convolution"}
    assert {key for key, call in chosen.items() if call == "convolution"} == {
        ("grad_weight", "tf32"),
        ("grad_weight", "float32_beside_tf32"),
    }
    assert "output in float16 on cpu: not by cudnn" in caplog.text


@pytest.mark.parametrize("wrong", ["cudnn", "matmul_to_float"])
def test_calls_that_compute_something_else_are_not_chosen(wrong, caplog):
    with stand_ins(wrong=wrong), caplog.at_level(logging.INFO, "mmdcn"):
        chosen = _products.choose(CPU)
    assert wrong not in chosen.values()
    assert f"not by {wrong}: its error is" in caplog.text


def test_the_choice_is_the_same_in_any_state_of_who_asks_first(monkeypatch):
    """A default device, a default dtype, inference mode, cuDNN switched off."""
    monkeypatch.setattr(_devices, "DECIDED", {})
    monkeypatch.setattr(_devices, "_served", {CPU})
    monkeypatch.setattr(_devices, "_exists", lambda device: True)
    device = torch.device("cuda", 5)
    monkeypatch.setattr(_devices, "_problem_of_kernels", lambda _: None)
    monkeypatch.setattr(_products, "_number", lambda _: -1)
    on_cpu = _products._results
    monkeypatch.setattr(_products, "_results", lambda _, *which: on_cpu(CPU, *which))
    torch.set_default_dtype(torch.float16)
    try:
        with (
            stand_ins(),
            torch.inference_mode(),
            torch.device("meta"),
            torch.autocast("cpu", torch.bfloat16),
            torch.backends.cudnn.flags(enabled=False),
        ):
            assert _devices.service(device).kernels
    finally:
        torch.set_default_dtype(torch.float32)
    assert device in _devices.DECIDED
    assert _products.chosen(CPU) == BEST


def test_short_memory_is_no_verdict(monkeypatch):
    """And leaves no call in force that was not tried to its end."""
    _products.choose(CPU)
    error = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    def fail(*_):
        raise error

    monkeypatch.setattr(_products, "_results", fail)
    with pytest.raises(RuntimeError) as caught:
        _products.choose(CPU)
    assert caught.value is error
    assert _products.chosen(CPU)["output", "float32_beside_tf32"] == "matmul"


def test_without_a_choice_products_are_by_matmul():
    assert set(_products.chosen(CPU).values()) == {"matmul"}
    assert (
        "; grad_weight: float32_beside_tf32 by matmul, tf32 by matmul, float16 by matmul"
        in _products.describe(CPU)
    )


def test_every_choice_ends_with_what_always_works():
    for arithmetics in _products.CALLS.values():
        for calls in arithmetics.values():
            assert calls[-1] == "matmul"
            assert len(calls) > 1
