"""The choice of the calls that compute the products, with the host's build of the operators."""

import logging

import pytest
import torch

from mmdcn.ops import _products
from tests.cuda.stand_ins import stand_ins

CPU = torch.device("cpu")


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
    assert _products.chosen(CPU) == {
        (product, arithmetic): calls[0]
        for product, arithmetics in _products.CALLS.items()
        for arithmetic, calls in arithmetics.items()
    }


def test_calls_that_fail_are_not_chosen(caplog):
    """The CPU has neither cuDNN nor products of another type than their operands'."""
    with caplog.at_level(logging.INFO, "mmdcn"):
        chosen = _products.choose(CPU)
    assert set(chosen.values()) == {"matmul", "convolution"}
    assert {key for key, call in chosen.items() if call == "convolution"} == {
        ("grad_weight", "tf32")
    }
    assert "output in float16 on cpu: not by cudnn" in caplog.text


@pytest.mark.parametrize("wrong", ["cudnn", "matmul_to_float"])
def test_calls_that_compute_something_else_are_not_chosen(wrong, caplog):
    with stand_ins(wrong=wrong), caplog.at_level(logging.INFO, "mmdcn"):
        chosen = _products.choose(CPU)
    assert wrong not in chosen.values()
    assert f"not by {wrong}: its error is" in caplog.text


def test_without_a_choice_products_are_by_matmul():
    assert set(_products.chosen(CPU).values()) == {"matmul"}
    assert "; grad_weight: tf32 by matmul, float16 by matmul" in _products.describe(CPU)


def test_every_choice_ends_with_what_always_works():
    for arithmetics in _products.CALLS.values():
        for calls in arithmetics.values():
            assert calls[-1] == "matmul"
            assert len(calls) > 1
