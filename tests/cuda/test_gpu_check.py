"""tools/gpu_check: what can be shown of it where there is no GPU."""

import importlib.util
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdcn.benchmark import cases
from mmdcn.ops import deform_conv2d

TOOLS = Path(__file__).parents[2] / "tools"
PASSED = {"status": "passed", "seconds": 0.0, "result": {}}


@pytest.fixture
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_sentence():
    result = subprocess.run(
        ["bash", TOOLS / "gpu_check.sh"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "torch sees no CUDA device" in result.stderr


def test_a_section_that_breaks_takes_no_other_with_it(gpu_check, tmp_path, monkeypatch, capsys):
    script = tmp_path / "sections.py"
    script.write_text(
        "import json, os, pathlib, sys, time\n"
        "name, result = sys.argv[2], pathlib.Path(sys.argv[4])\n"
        "if name == 'dies': os.abort()\n"
        "if name == 'hangs': result.write_text(json.dumps({'rows': [1]})); time.sleep(60)\n"
        "answers = {'works': {'rows': [2]}, 'finds': {'failures': ['wrong']}}\n"
        "answers['cannot'] = {'not_run': 'no such tool'}\n"
        "result.write_text(json.dumps(answers[name]))\n"
    )
    sections = {"dies": 30, "hangs": 2, "finds": 30, "cannot": 30, "works": 30}
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "SECTIONS", sections)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out")])
    monkeypatch.chdir(tmp_path)
    assert gpu_check.main() == 1

    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"gpu_check.json", "gpu_check.md", "gpu_check.log"}
    report = gpu_check.json.loads((tmp_path / "out" / "gpu_check.json").read_text())["sections"]
    assert {name: section["status"] for name, section in report.items()} == {
        "dies": "failed",
        "hangs": "failed",
        "finds": "failed",
        "cannot": "not run",
        "works": "passed",
    }
    assert "not done after 2 seconds" in report["hangs"]["error"]
    assert report["hangs"]["result"] == {"rows": [1]}  # what it knew when it was stopped
    assert "dies, hangs, finds did not pass" in capsys.readouterr().err


def test_the_environment_is_what_a_benchmark_says_of_it_and_more(gpu_check, tmp_path, monkeypatch):
    """With the properties of a GPU that is not there."""
    properties = SimpleNamespace(
        name="Some GPU",
        total_memory=80 * 2**30,
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=227 * 1024,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(gpu_check.machine._library, "cuda_is_loaded", lambda: False)
    with pytest.raises(AssertionError, match="CUDA library was not loaded"):
        gpu_check.environment(tmp_path)
    answers = iter([False, True])  # As there are no kernels here to ask for their name.
    monkeypatch.setattr(gpu_check.machine._library, "cuda_is_loaded", lambda: next(answers))
    found = gpu_check.environment(tmp_path)
    assert (found["gpu"], found["gpu_memory_gib"], found["compute_capability"]) == (
        *("Some GPU", 80.0, "9.0"),
    )
    assert (found["multiprocessors"], found["shared_memory_kib"]) == (132, 227)
    assert found["torch"] == torch.__version__
    assert found["cuda_library_loaded"]
    report = gpu_check.markdown({"sections": {"environment": {**PASSED, "result": found}}})
    assert "| gpu | Some GPU |" in report


def test_only_some_sections(gpu_check, tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(gpu_check, "run_section", lambda name, *_: ran.append(name) or PASSED)
    monkeypatch.chdir(tmp_path)
    command = ["gpu_check.py", "--out", "out", "--sections", "benchmark_tensor_core,agreement"]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_check.main() == 0
    assert ran == ["agreement", "benchmark_tensor_core"]

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", "out", "--sections", "tests,speed"])
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert "got ['speed']" in capsys.readouterr().err


def test_report_compares_with_dense_convolution_and_torchvision(gpu_check):
    times = {"mmdcn": 2.0, "conv2d": 1.0, "torchvision": 10.0}
    row = {
        **{"stage": "c3", "batch": 8, "dtype": "bfloat16", "layout": "channels_last"},
        "forward_ms": times,
        "forward_backward_ms": {"mmdcn": 6.0, "conv2d": 4.0},
        "forward_backward_peak_mb": {"mmdcn": 100.4, "conv2d": 50.0},
    }
    line = gpu_check.benchmark_table([row])[-1]
    columns = [column.strip() for column in line.strip("|").split("|")]
    assert columns == [
        *("c3", "8", "bfloat16", "channels_last"),
        *("2.000", "1.000", "10.000", "2.00", "5.00"),
        *("6.000", "4.000", "—", "1.50", "—"),
        "100 / 50 / —",
    ]


def test_a_row_of_the_benchmark_has_every_figure(gpu_check, monkeypatch):
    """With a clock and a memory instead of CUDA's, and small tensors on the CPU."""

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            return 1000 * (end.time - self.time)

    taken = {"Event": Event, "memory_allocated": lambda: 0, "max_memory_allocated": lambda: 10**6}
    for name in ("_sleep", "synchronize", "reset_peak_memory_stats"):
        taken[name] = lambda *_: None
    for name, stand_in in taken.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    small = [
        replace(case, channels=8, out_channels=8, height=9, width=9) for case in cases.SHAPES["r50"]
    ]
    monkeypatch.setitem(cases.SHAPES, "r50", tuple(small))
    make_tensors = cases.make_tensors
    monkeypatch.setattr(
        cases,
        "make_tensors",
        lambda case, device, offset_std: make_tensors(case, torch.device("cpu"), offset_std),
    )

    row = gpu_check.benchmark_row("c4", 2, torch.bfloat16, channels_last=True)
    assert [row[key] for key in ("stage", "batch", "dtype", "layout")] == [
        *("c4", 2, "bfloat16", "channels_last")
    ]
    for direction in ("forward", "forward_backward"):
        assert {"mmdcn", "conv2d"} <= set(row[f"{direction}_ms"])
        assert all(ms > 0 for ms in row[f"{direction}_ms"].values())
        assert row[f"{direction}_peak_mb"]["mmdcn"] == 1.0
    compared = {"mmdcn", "mmdcn, zero offsets", "conv2d", "torchvision"}
    assert set(row["forward_ms"]) | set(row["errors"]) == compared
    compared.add("mmdcn, deterministic")
    assert set(row["forward_backward_ms"]) | set(row["errors"]) == compared
    assert not torch.are_deterministic_algorithms_enabled()
    assert len(gpu_check.benchmark_table([row])) == 3
    assert len(gpu_check.kernels_table([row], [row])) == 3
    assert len(gpu_check.kernels_table([], [row])) == 3


def test_report_puts_both_kernels_side_by_side(gpu_check):
    row = {"stage": "c3", "batch": 8, "dtype": "bfloat16", "layout": "channels_last"}
    simple = {**row, "forward_ms": {"mmdcn": 8.0, "conv2d": 1.0}}
    simple["forward_backward_ms"] = {"mmdcn": 30.0}
    tensor_core = {**row, "forward_ms": {"mmdcn": 2.0, "conv2d": 1.0, "mmdcn, zero offsets": 1.5}}
    tensor_core["forward_backward_ms"] = {"mmdcn": 6.0, "mmdcn, deterministic": 9.0, "conv2d": 3.0}
    line = gpu_check.kernels_table([simple], [tensor_core])[-1]
    columns = [column.strip() for column in line.strip("|").split("|")]
    assert columns == [
        *("c3", "8", "bfloat16", "channels_last"),
        *("8.000", "2.000", "4.00", "2.00", "1.50"),
        *("30.000", "6.000", "5.00", "2.00", "—"),
        "1.50",
    ]


def test_sections_run_with_the_kernels_of_their_name(gpu_check, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        gpu_check, "agreement", lambda _: chosen.append(gpu_check.on_tensor_cores()) or {}
    )
    monkeypatch.setenv("MMDCN_CUDA_KERNELS", "simple")
    for section in ("agreement", "agreement_tensor_core"):
        assert section in gpu_check.SECTIONS
        command = ["gpu_check.py", "--section", section, "--result", str(tmp_path / "result")]
        monkeypatch.setattr(sys, "argv", command)
        assert gpu_check.main() == 0
    assert chosen == [False, True]


@pytest.mark.parametrize("kernels", ["simple", "tensor_core"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_drawn_calls_are_valid(gpu_check, monkeypatch, dtype, kernels):
    monkeypatch.setenv("MMDCN_CUDA_KERNELS", kernels)
    for seed in range(10):
        tensors, arguments = gpu_check.draw_call(seed, dtype)
        again, _ = gpu_check.draw_call(seed, dtype)
        assert all(t is None or torch.equal(t, again[name]) for name, t in tensors.items())
        results = gpu_check.output_and_gradients(deform_conv2d, tensors, arguments)
        assert all(torch.isfinite(value).all() for value in results.values())
        for name, value in results.items():
            assert gpu_check.relative_error(value, value) == 0.0, name
    assert gpu_check.relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
