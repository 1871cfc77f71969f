"""Calls of deform_conv2d that go straight to the compiled operator, and what becomes of errors."""

import gc
import itertools
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn.ops import _devices, deform_conv2d


@pytest.fixture
def straight(monkeypatch):
    """What the operator does with each call that goes straight to it; its calls are counted."""
    module = sys.modules["mmdcn.ops.deform_conv"]
    operator, calls = module._OPERATOR, []

    class Operator:
        error = None

        def __call__(self, *arguments, **options):
            return operator(*arguments, **options)

        def forward(self, *arguments, **options):
            calls.append(arguments)
            if self.error is not None:
                raise self.error
            return operator.forward(*arguments, **options)

    watched = Operator()
    watched.calls = calls
    monkeypatch.setattr(module, "_OPERATOR", watched)
    return watched


def small_call(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes = {"input": (1, 2, 4, 4), "offset": (1, 2, 4, 4), "weight": (2, 2, 1, 1)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_device_are_not_tried_again(straight, error):
    """They pass with their own text, without another in front, and keep no tensor alive."""
    straight.error = error
    with pytest.raises(type(error)) as caught:
        deform_conv2d(**small_call())
    assert caught.value is error
    assert error.__context__ is None
    assert len(straight.calls) == 1


def test_a_refused_call_keeps_no_tensor_alive(straight):
    straight.error = torch.OutOfMemoryError("CUDA out of memory")
    tensors = small_call()
    alive = weakref.ref(tensors["input"])
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            deform_conv2d(**tensors)
        straight.error = None
        straight.calls.clear()
        tensors.clear()
        assert alive() is None
    finally:
        gc.enable()


def test_errors_of_arguments_are_named(straight):
    tensors = small_call() | {"offset": torch.zeros(1, 3, 4, 4)}
    with pytest.raises(ValueError, match=r"^offset: offset\.shape\[1\] is not valid"):
        deform_conv2d(**tensors)
    assert len(straight.calls) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_in_half_precision_fail_nowhere(straight, dtype):
    """They are converted before the operator would refuse them."""
    tensors = small_call(dtype)
    output = deform_conv2d(**tensors)
    assert not straight.calls
    wide = tensors | {"offset": tensors["offset"].float()}
    assert torch.equal(output, deform_conv2d(**wide))
    assert len(straight.calls) == 1
    with pytest.raises(TypeError, match=r"^mask: expected dtype float32 beside"):
        deform_conv2d(**small_call(), mask=torch.ones(1, 1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("decided", [None, False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cuda_tensors_go_straight_where_our_kernels_are_known_to_run(
    decided, deterministic, monkeypatch
):
    """With what stands for tensors on a GPU."""
    module = sys.modules["mmdcn.ops.deform_conv"]
    device = torch.device("cuda", 3)
    tensor = SimpleNamespace(is_cpu=False, is_cuda=True, device=device, dtype=torch.float32)
    monkeypatch.setattr(module, "PLAIN", (SimpleNamespace,))
    if decided is not None:
        monkeypatch.setitem(_devices.DECIDED, device, _devices.Service(decided))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    goes = module._goes_straight(tensor, tensor, tensor, None, tensor)
    assert goes == (decided is True and not deterministic)


@pytest.fixture
def float32_precision():
    """Sets torch's settings of the convolutions and of the products of matrices, for a test.

    pytest's monkeypatch cannot: it deletes attributes that an instance has no dictionary entry for.
    """
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [each.fp32_precision for each in settings]

    def choose(*values: str) -> None:
        for each, value in zip(settings, values):
            each.fp32_precision = value

    yield choose
    choose(*before)


def test_torchs_settings_are_asked_for_when_the_operator_runs(float32_precision, monkeypatch):
    ask = torch.ops.mmdcn.cuda_settings
    for tf32, matmul_tf32 in itertools.product((True, False), repeat=2):
        names = ["tf32" if setting else "ieee" for setting in (tf32, matmul_tf32)]
        float32_precision(*names)
        assert ask() == (tf32, matmul_tf32, True, False)
    cudnn = torch.backends.cudnn
    try:
        cudnn.enabled = False
        assert not ask()[2]
        cudnn.deterministic = True
        assert ask()[3]
    finally:
        cudnn.enabled, cudnn.deterministic = True, False
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert ask()[2:] == (True, True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_graph_has_none_of_the_settings_that_it_was_made_under(float32_precision):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "mmdcn":
                options.append(kwargs)
            return function(*args, **(kwargs or {}))

    options = []
    float32_precision("tf32", "tf32")
    with FakeTensorMode(), Recorder():
        tensors = {n: torch.empty(t.shape, device="cuda") for n, t in small_call().items()}
        deform_conv2d(**tensors)
    assert [given or {} for given in options] == [{}]
