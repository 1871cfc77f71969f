"""What torch.use_deterministic_algorithms(True) asks of our operators on CUDA; without a GPU."""

import pytest
import torch

from mmdcn.ops import _determinism, _registration
from mmdcn.ops._registration import OPERATORS

PRODUCTS = {"deform_conv2d", "deform_conv_nd"}


@pytest.fixture(params=[None, ":4096:8", ":16:8", ":8:8", ""], ids=str)
def workspace(request, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if request.param is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", request.param)
    return request.param


def test_products_are_refused_as_torch_refuses_them(workspace, deterministic):
    if workspace in (":4096:8", ":16:8"):
        _determinism.alert_products("deform_conv2d")
        return
    with pytest.raises(
        RuntimeError, match=r"^deform_conv2d is not deterministic on CUDA"
    ) as caught:
        _determinism.alert_products("deform_conv2d")
    sentence = "CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8"
    assert sentence in str(caught.value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match=sentence):
        _determinism.alert_products("deform_conv2d")


def test_nothing_is_refused_that_need_not_be_deterministic(workspace):
    _determinism.alert_products("deform_conv2d")
    _determinism.alert_gradient("dcnv3 or dcnv4")


def test_convolutions_have_products():
    assert {name for name, operator in OPERATORS.items() if operator.multiplies} == PRODUCTS


@pytest.mark.parametrize("name", OPERATORS)
def test_backward_passes_on_cuda(name, monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    operator, options = OPERATORS[name], {}
    wanted = dict.fromkeys(operator.gradients, True)
    expected = "uses cuBLAS" if name in PRODUCTS else "gradient of .* is not deterministic"
    with pytest.raises(RuntimeError, match=expected):
        _registration._order_of_addition(operator, options, wanted)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if "deterministic" in operator.backward_options:
        _registration._order_of_addition(operator, options, wanted)
        assert options == {"deterministic": True}
    else:
        with pytest.raises(RuntimeError, match=r"gradient of .* is not deterministic on CUDA"):
            _registration._order_of_addition(operator, options, wanted)
