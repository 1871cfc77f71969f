"""The decision what computes on a device, made once for each; without that device."""

import logging
import re
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn import mmcv_kernels
from mmdcn.ops import _devices, _library, _memory, _products
from mmdcn.ops._registration import OPERATORS
from tests.ops.calls import CALLS
from tests.ops.contract import EVERY
from tests.switched_off import CPU, SUBSTITUTES, counting

GPU = torch.device("cuda", 1)


@pytest.fixture
def undecided(monkeypatch):
    monkeypatch.setattr(_devices, "DECIDED", {})
    monkeypatch.setattr(_devices, "_served", set())
    monkeypatch.setattr(_devices, "_offered", {})
    monkeypatch.setattr(_devices, "_exists", lambda device: True)


@pytest.fixture
def gpu(monkeypatch, undecided):
    """A GPU that is not there, of compute capability 7.5, with the library loaded."""
    monkeypatch.setattr(_library, "cuda_is_loaded", lambda: True)
    monkeypatch.setattr(_devices, "_small_calls", lambda device: {"deform_conv2d": ()})
    monkeypatch.setattr(_devices, "_run_kernels", lambda arguments: None)
    monkeypatch.setattr(_devices, "driver_cuda", lambda: "12.4")
    monkeypatch.setattr(_products, "choose", lambda device: None)
    synchronized = []
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return synchronized


def failing(monkeypatch, error: Exception) -> list:
    calls = []

    def fail(arguments):
        calls.append(arguments)
        raise error

    monkeypatch.setattr(_devices, "_run_kernels", fail)
    return calls


NO_IMAGE = "mmdcn: CUDA refused to launch a kernel: no kernel image is available for execution on"


def test_a_gpu_on_which_our_kernels_run(gpu, monkeypatch, caplog):
    """It is said once, and torch's calls for the products are chosen with that, once."""
    caplog.set_level(logging.INFO)
    chosen = []
    monkeypatch.setattr(_products, "choose", chosen.append)
    for operator in OPERATORS:
        assert _devices.server(operator, GPU) == _devices.OURS
    assert chosen == [GPU]
    assert gpu == [GPU, GPU]  # An error of a kernel shows when it has run; of others', before.
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "cuda:1" in record.getMessage() and "mmdcn" in record.getMessage()


def test_a_gpu_on_which_they_do_not_run(gpu, monkeypatch, caplog):
    """Decided, and said, once: which, why, and what to do about it."""
    calls = failing(monkeypatch, RuntimeError(f"{NO_IMAGE} the device\nmore advice"))
    for _ in range(2):
        for operator in OPERATORS:
            assert _devices.server(operator, GPU) == _devices.REFERENCE
    assert len(calls) == 1
    assert gpu == [GPU, GPU]  # before, and to clear the error
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "\n" not in message and "advice" not in message
    for part in ("cuda:1", NO_IMAGE, "TORCH_CUDA_ARCH_LIST=7.5", "CUDA 12.4", "plain PyTorch"):
        assert part in message
    assert "mmcv" not in message


def test_a_gpu_that_mmcv_serves(gpu, monkeypatch, caplog):
    """If a small call of mmcv's kernels is right there, too."""
    failing(monkeypatch, RuntimeError(NO_IMAGE))
    monkeypatch.setattr(_devices, "_small_calls", lambda _: dict.fromkeys(SUBSTITUTES, ()))
    _devices.offer("deform_conv2d", lambda: torch.ones(1))
    _devices.offer("deform_roi_pool", lambda: torch.zeros(1))
    assert _devices.server("deform_conv2d", GPU) == _devices.MMCV
    assert _devices.server("deform_roi_pool", GPU) == _devices.REFERENCE
    assert _devices.server("deform_conv_nd", GPU) == _devices.REFERENCE
    assert "mmcv's kernels compute deform_conv2d there" in caplog.text


def test_kernels_that_compute_nonsense_do_not_serve(monkeypatch, undecided):
    ones = [torch.ones(1)]
    fake = SimpleNamespace(
        deform_aggregate=lambda *_: torch.full((1,), float("nan")),
        deform_conv2d=lambda *_: ones[0],
        deform_conv2d_backward=lambda *_: 4 * ones,
    )
    arguments = _devices._small_calls(CPU)
    _devices._run_kernels(arguments)
    monkeypatch.setattr(torch.ops, "mmdcn", fake)
    with pytest.raises(RuntimeError, match="wrong numbers"):
        _devices._run_kernels(arguments)


def test_small_calls_run_on_mmcvs_kernels(mmcv_offered):
    assert all(_devices._runs(operator, CPU) for operator in SUBSTITUTES)
    # mmcv's own function, which has no kernel for the CPU.
    theirs = sys.modules["mmcv.ops.deform_roi_pool"].DeformRoIPoolFunction
    apply = torch.autograd.Function.apply.__func__
    mmcv_kernels.offer(None, None, lambda *arguments: apply(theirs, *arguments))
    assert not _devices._runs("deform_roi_pool", CPU)
    assert not _devices._runs("deform_conv2d", CPU)


def test_an_error_of_what_ran_before_is_not_caught(gpu, monkeypatch):
    calls = failing(monkeypatch, RuntimeError("must not be called"))
    error = torch.AcceleratorError("CUDA error: device-side assert triggered")

    def synchronize(device):
        raise error

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError) as caught:
        _devices.service(GPU)
    assert caught.value is error
    assert not calls
    assert not _devices.DECIDED


UNCLEAR = "mmdcn: torch's aten::bmm failed: torch >= 2.13 says why"
SHORT_OF_MEMORY = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("full"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError(UNCLEAR),
    ],
    ids=str,
)


@pytest.fixture
def free_memory(monkeypatch):
    """``free_memory(mebibytes)``: what every device has left."""

    def set_free(mebibytes: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (mebibytes << 20, 80 << 30))

    set_free(100)
    return set_free


@SHORT_OF_MEMORY
def test_nothing_is_decided_while_memory_is_short(error, gpu, monkeypatch, free_memory):
    failing(monkeypatch, error)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. ") as caught:
        _devices.service(GPU)
    assert str(error) in str(caught.value)
    assert not _devices.DECIDED
    monkeypatch.setattr(_devices, "_run_kernels", lambda _: None)
    assert _devices.server("deform_conv2d", GPU) == _devices.OURS


def test_an_unclear_error_is_a_verdict_while_there_is_memory(gpu, monkeypatch, free_memory):
    free_memory(2000)
    failing(monkeypatch, RuntimeError(UNCLEAR))
    assert _devices.server("deform_conv2d", GPU) == _devices.REFERENCE
    assert GPU in _devices.DECIDED


@SHORT_OF_MEMORY
def test_products_are_chosen_when_there_is_memory(error, gpu, monkeypatch, free_memory):
    """Until then our kernels compute, with what always works between them."""
    probed = []
    monkeypatch.setattr(_devices, "_run_kernels", probed.append)

    def choose(device):
        raise error

    monkeypatch.setattr(_products, "choose", choose)
    assert _devices.server("deform_conv2d", GPU) == _devices.OURS
    assert not _devices.DECIDED
    chosen = []
    monkeypatch.setattr(_products, "choose", chosen.append)
    for _ in range(2):
        assert _devices.server("deform_conv2d", GPU) == _devices.OURS
    assert chosen == [GPU]
    assert len(probed) == 1
    assert GPU in _devices.DECIDED


def test_products_are_chosen_when_torch_does_not_refuse_them(gpu, monkeypatch, deterministic):
    """As it does where additions are to have an order, and cuBLAS is not set up for that."""
    chosen, probed = [], []
    monkeypatch.setattr(_products, "choose", chosen.append)
    monkeypatch.setattr(_devices, "_run_kernels", probed.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for _ in range(2):
        assert _devices.server("deform_aggregate", GPU) == _devices.OURS
    torch.use_deterministic_algorithms(False)
    assert not chosen
    assert not _devices.DECIDED
    assert _devices.server("deform_conv2d", GPU) == _devices.OURS
    assert chosen == [GPU]
    assert len(probed) == 1


@pytest.mark.parametrize("call", ["forward", "backward", "without gradients"])
def test_short_memory_is_torchs_own_error(call, gpu, monkeypatch):
    """For who goes on with less, as mmdet's AvoidOOM, which reads the text."""
    out_of_memory = RuntimeError("mmdcn: failed to allocate a tensor: out of memory")

    def raise_it(*_, **__):
        raise out_of_memory

    seen = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    assert _memory.as_torch_has_it(seen, CPU) is seen
    assert _memory.as_torch_has_it(out_of_memory, CPU) is out_of_memory
    assert str(_memory.as_torch_has_it(seen, GPU)) == str(seen)
    other = RuntimeError("CUDA error: device-side assert triggered")
    assert _memory.as_torch_has_it(other, GPU) is other

    # The device of the tensors, which are on the CPU, is all that is not as it would be.
    on_gpu = _memory.as_torch_has_it
    monkeypatch.setattr(_memory, "as_torch_has_it", lambda error, _: on_gpu(error, GPU))
    problem = CALLS["deform_conv2d-v1"]
    tensors = problem.tensors(torch.float32)
    tensors["input"].requires_grad_(call != "without gradients")
    library = torch.library.Library("mmdcn", "IMPL")
    name = "deform_conv2d_backward" if call == "backward" else "deform_conv2d"
    try:
        output = problem.function(**tensors, **problem.arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl(name, raise_it, "CPU", allow_override=True)
        with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. mmdcn: failed to"):
            if call == "backward":
                output.sum().backward()
            else:
                problem.function(**tensors, **problem.arguments)
    finally:
        library._destroy()


def test_nothing_is_decided_while_a_graph_is_captured(gpu, monkeypatch):
    calls = failing(monkeypatch, RuntimeError("must not be called"))
    monkeypatch.setattr(_devices, "_is_capturing", lambda: True)
    assert _devices.server("deform_conv2d", GPU) == _devices.OURS
    assert not calls
    assert not _devices.DECIDED


def test_threads_decide_once(gpu, monkeypatch):
    calls = []

    def run(arguments):
        calls.append(arguments)
        time.sleep(0.05)  # so that all others come meanwhile

    monkeypatch.setattr(_devices, "_run_kernels", run)
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        assert _devices.server("deform_conv2d", GPU) == _devices.OURS

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


@pytest.mark.parametrize(
    "device, built, problem, expected",
    [
        ("cuda:1", False, None, "without its CUDA library; .*nvcc.*pip install"),
        ("cuda:1", True, None, r"torch .* is not built for CUDA; install"),
        ("cuda:1", True, "libtorch_cuda.so: not found", "libtorch_cuda.so: not found.*pip install"),
        ("mps:0", False, None, "for cpu and cuda, so move the model"),
    ],
)
def test_devices_without_our_library(
    device, built, problem, expected, undecided, monkeypatch, tmp_path, caplog
):
    library = tmp_path / "_cuda.abi3.so"
    if built:
        library.touch()
    monkeypatch.setattr(_library, "CUDA_LIBRARY", library)
    monkeypatch.setattr(_library, "CUDA_PROBLEM", problem)
    monkeypatch.setattr(_library, "cuda_is_loaded", lambda: False)
    device = torch.device(device)
    assert _devices.server("deform_conv2d", device) == _devices.REFERENCE
    (record,) = caplog.records
    assert record.getMessage().startswith(f"mmdcn's kernels do not compute on {device}: ")
    assert re.search(expected, record.getMessage())


def test_a_cuda_library_that_does_not_load_is_kept_in_mind(monkeypatch, tmp_path):
    """Importing mmdcn goes on: the CPU is served all the same."""
    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(_library, "CUDA_LIBRARY", library)
    monkeypatch.setattr(_library, "CUDA_PROBLEM", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def asked():
        raise AssertionError("a process that has asked for GPUs cannot fork")

    for name in ("is_available", "device_count", "init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    _library.load()
    assert library.name in _library.CUDA_PROBLEM


def test_the_decision_is_a_constant_of_a_graph(gpu, monkeypatch):
    """Made while tracing, if it was not made before, and not a part of the graph."""
    calls = []
    monkeypatch.setattr(_devices, "_run_kernels", lambda _: calls.append(1))

    def compute(x):
        return x + 1 if _devices.server("deform_conv2d", GPU) == _devices.OURS else x - 1

    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert len(calls) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@EVERY
def test_a_model_is_traced_for_a_gpu_that_is_not_there(call, undecided, monkeypatch, mmcv_offered):
    """By tensors without values: what is traced is our operator."""
    monkeypatch.setattr(_devices, "_exists", lambda device: torch.cuda.is_available())
    with FakeTensorMode():
        tensors = {
            name: torch.empty(tensor.shape, device="cuda")
            for name, tensor in call.tensors(torch.float32).items()
        }
        with counting(monkeypatch) as counts:
            output = call.function(**tensors, **call.arguments)
    assert output.device.type == "cuda"
    assert counts["reference"] == 0
    assert not _devices.DECIDED


# --------------------------------------------------------------------- the state of who asks first


def somebodys_hook(tensor):
    raise AssertionError("a hook of the caller's was called")


STATES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "another device": lambda: torch.device("meta"),
    "tensors without values": FakeTensorMode,
    "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(somebodys_hook, somebodys_hook),
}


@pytest.mark.parametrize("state", STATES)
def test_what_is_in_force_for_who_asks_first_does_not_count(state, gpu, monkeypatch):
    def probe(device):
        leaf = torch.ones(2, 2, requires_grad=True)
        product = leaf @ leaf
        (gradient,) = torch.autograd.grad(product.square().sum(), leaf)
        assert product.dtype == torch.float32
        assert product.device.type == "cpu"
        assert not product.is_inference()
        assert type(gradient) is Tensor
        probed.append(gradient.sum().item())

    probed = []
    monkeypatch.setattr(_devices, "_run_kernels", probe)
    monkeypatch.setattr(_products, "choose", probe)
    with STATES[state]():
        assert _devices.server("deform_conv2d", GPU) == _devices.OURS
    assert probed == [64.0, 64.0]


def test_a_default_device_does_not_count(gpu, monkeypatch):
    monkeypatch.setattr(_products, "choose", lambda _: devices.append(torch.ones(1).device))
    devices = []
    torch.set_default_device("meta")
    try:
        _devices.service(GPU)
    finally:
        torch.set_default_device(None)
    assert devices == [CPU]
