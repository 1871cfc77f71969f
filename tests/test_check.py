"""The report of ``python -m mmdcn.check``, and the self-test that it runs."""

import pytest
import torch

from mmdcn import check, ops, self_test
from mmdcn.errors import InputError
from mmdcn.ops import _devices
from tests.ops.problems import TOLERANCE
from tests.switched_off import CPU, counting, switch_off

EVERY = pytest.mark.parametrize("name", ops.__all__)


def test_every_operator_and_dtype_is_tested():
    assert set(self_test.calls()) == set(ops.__all__)
    assert self_test.TOLERANCE == TOLERANCE


@EVERY
@pytest.mark.parametrize("dtype", self_test.TOLERANCE, ids=str)
def test_right_operators_pass_and_compute_on_the_device(name, dtype, monkeypatch):
    with counting(monkeypatch) as counts:
        assert self_test.largest_error(name, CPU, dtype) <= self_test.TOLERANCE[dtype]
    assert counts == {"ours": 2}
    switch_off(monkeypatch)
    with counting(monkeypatch) as counts:
        assert self_test.largest_error(name, CPU, dtype) <= self_test.TOLERANCE[dtype]
    assert {**counts} == {"ours": 0, "reference": 1}


class Wrong(torch.autograd.Function):
    """The identity with a gradient that is a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@EVERY
@pytest.mark.parametrize("what", ["output", "gradient", "nan"])
def test_wrong_operators_do_not_pass(name, what, monkeypatch):
    function = getattr(ops, name)

    def wrong(input, *arguments, **options):
        if what == "gradient":
            return function(Wrong.apply(input), *arguments, **options)
        return function(input, *arguments, **options) * (1.01 if what == "output" else float("nan"))

    monkeypatch.setattr(ops, name, wrong)
    assert not self_test.largest_error(name, CPU, torch.float32) <= 1e-3


def test_torchs_setting_of_tf32_is_left_as_it_was(monkeypatch):
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    seen = []
    function = ops.deform_conv2d

    def look(*arguments, **options):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return function(*arguments, **options)

    monkeypatch.setattr(ops, "deform_conv2d", look)
    try:
        self_test.largest_error("deform_conv2d", CPU, torch.float32)
        assert seen == ["ieee"]
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_all_is_well_on_the_cpu(capsys):
    assert check.main() == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok (") == len(ops.__all__) * 4
    assert "mmdcn's kernels compute on cpu." in printed
    assert "What to do" not in printed


def test_an_instruction_set_that_is_not_there_is_one_sentence(monkeypatch):
    """That is how a tool ends with an InputError."""

    def refuse():
        raise RuntimeError("MMDCN_CPU_CAPABILITY: expected portable, got avx1024\nand more")

    monkeypatch.setattr(check.torch.ops.mmdcn, "cpu_capability", refuse)
    with pytest.raises(InputError, match=r"^MMDCN_CPU_CAPABILITY: expected portable, got avx1024$"):
        check.main()


def test_it_goes_on_after_a_test_that_failed(monkeypatch, capsys):
    function = self_test.largest_error

    def largest_error(name, device, dtype):
        if name == "dcnv4" and dtype == torch.float16:
            raise NotImplementedError("no such kernel")
        if name == "deform_conv1d":
            return float("nan")
        return function(name, device, dtype)

    monkeypatch.setattr(self_test, "largest_error", largest_error)
    assert check.main() == 1
    printed = capsys.readouterr().out
    assert printed.count(" ok (") == (len(ops.__all__) - 1) * 4 - 1
    assert "float16 FAILED (NotImplementedError: no such kernel), bfloat16 ok" in printed
    assert printed.count("WRONG (nan)") == 4
    assert printed.count("What to do: ") == 1


def test_it_says_what_computes_where_our_kernels_do_not(monkeypatch, capsys):
    switch_off(monkeypatch)
    assert check.main() == 0
    assert (
        "do not compute on cpu: switched off; until then plain PyTorch" in capsys.readouterr().out
    )


def test_a_device_that_is_lost_is_not_asked_again(monkeypatch, capsys):
    lost = iter([False, True])
    monkeypatch.setattr(check, "_is_lost", lambda device: next(lost))
    assert check.main() == 1
    printed = capsys.readouterr().out
    assert "cpu is LOST to this process." in printed
    assert printed.count(" ok (") == 2 * 4


def test_a_gpu_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(_devices, "driver_cuda", lambda: "12.4")
    monkeypatch.setattr(check, "driver", lambda: "550.54")
    assert check.description(torch.device("cuda", 0)) == (
        "Tesla T4, compute capability 7.5, driver 550.54 (up to CUDA 12.4)"
    )


@pytest.mark.parametrize("library", ["libmissing.so.1", "libc.so.6"])
def test_what_a_driver_does_not_tell_is_unknown(monkeypatch, library):
    monkeypatch.setattr(_devices, "_DRIVER", library)
    assert _devices.driver_cuda() == "unknown"
