"""tools/gpu_check, without a GPU: its cases, in tiny sizes, and what they go by."""

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdcn import ops, timing
from mmdcn.benchmark import implementations
from mmdcn.benchmark.gpu import accuracy, parent, profiling, programs, report, smoke, worker
from mmdcn.benchmark.gpu.calls import OPERATORS
from mmdcn.benchmark.gpu.sections import SECTIONS, Wrong
from mmdcn.benchmark.gpu.settings import Settings

ROOT = Path(__file__).parents[2]
# Sections whose cases run processes that take long to start: these have tests of their own.
SLOW = {"self-test", "tests", "beside"}


def settings(folder: Path, **more) -> Settings:
    return Settings("cpu", str(folder), **more)


@pytest.fixture
def torchvision(monkeypatch):
    """As much of torchvision as is called, in modules of its names."""

    class TinyDetector(nn.Module):
        def __init__(self, **_):
            super().__init__()
            block = nn.ModuleDict({"conv2": nn.Conv2d(3, 4, 3, padding=1)})
            body = nn.ModuleDict({"layer2": nn.ModuleList([block])})
            self.backbone = nn.ModuleDict({"body": body})

        def forward(self, images, targets=None):
            features = self.backbone["body"]["layer2"][0]["conv2"](torch.stack(images))
            assert self.training == (targets is not None)
            return [{}] * len(images) if targets is None else {"loss": features.float().mean()}

    modules = {
        "torchvision": {},
        "torchvision.ops": {"deform_conv2d": ops.deform_conv2d},
        "torchvision.models": {},
        "torchvision.models.detection": {"fasterrcnn_resnet50_fpn": TinyDetector},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def ended(records: Path) -> list[dict]:
    return [line for line in parent._read(records) if "ended" in line]


# ------------------------------------------------------------------------------- every case, tiny


@pytest.mark.parametrize("section", [name for name in SECTIONS if name not in SLOW])
def test_every_case_of_a_section(section, tmp_path, torchvision, monkeypatch):
    """Each runs on the CPU, or says what it needs, and its results make a table."""
    monkeypatch.setattr(programs, "find", lambda program: None)
    records = tmp_path / "records"
    assert worker.run(settings(tmp_path), section, records) == 0
    cases = ended(records)
    assert len(cases) == parent._read(records)[0]["cases"] > 0
    assert len({case["case"] for case in cases}) == len(cases)
    expected = {"not run"} if section in ("sanitizers", "counters") else {"passed"}
    assert {case["status"] for case in cases} == expected, cases
    found = {"status": "passed", "seconds": 1.0, "total": len(cases), "cases": cases}
    part = SECTIONS[section].part or "fast"
    text = report.markdown({"part": part, "device": "cpu", "sections": {section: found}})
    assert f"| {section} | passed | 1 s | {len(cases)} {expected.pop()} |" in text
    if section in report._TABLES and cases[0]["status"] == "passed":
        # A row at least below the table's head.
        _, table = text.split(f"## {section.capitalize()}\n")
        assert table.count("\n|") >= 3


def test_a_sanitizer_runs_every_operator_in_every_way(tmp_path):
    """In two dtypes, which come first."""
    names = [case.name for case in smoke.variants(Settings("cuda", str(tmp_path)))]
    first = names[: smoke.OF_TWO_DTYPES]
    for operator in OPERATORS:
        of_each = [
            {name.replace(dtype, "") for name in first if name.startswith(f"{operator}, {dtype}")}
            for dtype in ("float32", "float16")
        ]
        assert of_each[0] == of_each[1]
        assert len(of_each[0]) == (5 if operator in OPERATORS[:3] else 3)
    assert f"{OPERATORS[0]}, bfloat16, vectors" == names[smoke.OF_TWO_DTYPES]


def test_a_convolution_that_is_wrong_is_not_timed(tmp_path, monkeypatch):
    right = ops.deform_conv2d
    monkeypatch.setattr(implementations, "deform_conv2d", lambda *a, **k: 1.01 * right(*a, **k))
    monkeypatch.setattr(timing, "interleave", None)
    assert worker.run(settings(tmp_path), "convolution", tmp_path / "records", 0, 3) == 0
    for case in ended(tmp_path / "records"):
        assert case["status"] == "failed"
        assert "output: distance 1.0e-02" in case["error"]
        assert case["result"]["expected_from"] == "plain PyTorch"


def test_kernels_that_ran_must_be_ours():
    cuda = torch.device("cuda")
    ours = "mmdcn::cuda::gather_kernel<8, 2, __half, float, __half>"
    full = (
        "void mmdcn::cuda::(anonymous namespace)::gather_kernel<8, 2, __half, float, __half>(int)"
    )
    assert profiling.short_name(full) == ours
    assert profiling.short_name("void unnamed>::scatter_kernel<4>(int)") == "scatter_kernel<4>"
    assert profiling.problem({ours: 3.0}, cuda, ("gather_kernel",)) is None
    assert profiling.problem({}, cuda, ("gather_kernel",)) is None  # nothing seen, nothing said
    assert "none of the kernels" in profiling.problem({"gemm": 3.0}, cuda)
    problem = profiling.problem({ours: 3.0}, cuda, ("gather_kernel", "scatter_kernel"))
    assert problem.startswith("no scatter_kernel among our kernels")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adding_up_in_half_precision_is_seen(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 1024, generator=generator).to(dtype) for _ in range(2))
    exact = a.double() @ b.double().T
    in_float32 = (a.float() @ b.float().T).to(dtype)
    assert accuracy.outside_one_rounding(in_float32, exact) == 0
    parts = [(a[:, i::4].float() @ b[:, i::4].float().T).to(dtype) for i in range(4)]
    in_halves = parts[0] + parts[1] + parts[2] + parts[3]
    assert accuracy.outside_one_rounding(in_halves, exact) > 0.02


def test_exact_sums_are_those_of_the_convolution():
    generator = torch.Generator().manual_seed(0)
    shapes = {"input": (2, 4, 6, 5), "offset": (2, 18, 6, 5), "weight": (3, 4, 3, 3)}
    shapes["mask"] = (2, 9, 6, 5)
    leaves = {n: torch.randn(s, generator=generator).requires_grad_() for n, s in shapes.items()}
    output = ops.deform_conv2d(**leaves, padding=1)
    grad_output = torch.randn(output.shape, generator=generator)
    output.backward(grad_output)
    for product, expected in (("output", output), ("grad_weight", leaves["weight"].grad)):
        sums = accuracy.exact_sums(leaves, grad_output, product)
        torch.testing.assert_close(sums.float(), expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- programs


@pytest.mark.parametrize("status", [0, 1])
def test_the_self_test_must_end_well(tmp_path, monkeypatch, status):
    monkeypatch.setattr(programs.processes, "run", lambda command, log: (status, "what it said"))
    (case,) = programs.self_test(settings(tmp_path))
    if status == 0:
        assert case.run() == {"output": "what it said"}
        return
    with pytest.raises(Wrong, match="it ended with 1") as caught:
        case.run()
    assert caught.value.result == {"output": "what it said"}


def test_tests_are_run_or_it_is_said_why_not(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['cuda: GPU']\n")
    (folder / "test_gpu_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.cuda\n"
        "def test_right(): pass\ndef test_wrong(): assert 1 == 2\n"
        "def test_left_out(): pytest.skip('needs two GPUs')\n"
    )
    records = tmp_path / "records"
    worker.run(settings(tmp_path, tests=str(tmp_path)), "tests", records)
    (case,) = ended(records)
    assert case["status"] == "failed"
    assert case["result"] == {
        **{"tests": 3, "skipped": 1, "reasons_for_skipping": ["needs two GPUs"]},
        "failures": ["test_wrong: assert 1 == 2"],
    }
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    worker.run(settings(tmp_path, tests=str(tmp_path)), "tests", records)
    assert ended(records)[-1]["status"] == "not run"
    assert "pytest and hypothesis not installed" in ended(records)[-1]["error"]


def test_counters_are_read_from_what_ncu_prints():
    kernel = '"void mmdcn::cuda::<unnamed>::gather_kernel<8, 2>(int)"'
    output = (
        "==PROF== Connected to process 1\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        f'"0",{kernel},"gpu__time_duration.sum","nsecond","12,345"\n'
        f'"0",{kernel},"l1tex__t_sector_hit_rate.pct","%","71.5"\n'
        f'"0",{kernel},"something else","%","1"\n'
    )
    (found,) = programs.counters_of(output)
    assert found["time, ns"] == "12,345" and found["L1 hits, %"] == "71.5"
    assert found["kernel"] == "mmdcn::cuda::gather_kernel<8, 2>" and len(found) == 3
    assert programs.counters_of("ERR_NVGPUCTRPERM") == []


def test_another_mmdcn_is_timed_in_a_process_of_its_own(tmp_path):
    records = tmp_path / "records"
    worker.run(settings(tmp_path, beside=str(ROOT)), "beside", records, 1, 1)
    (case,) = ended(records)
    assert case["status"] == "passed", case
    assert str(ROOT) in case["result"]["mmdcn"]
    assert [row["dtype"] for row in case["result"]["rows"]] == ["float16", "float32", "bfloat16"]
    found = {"status": "passed", "seconds": 1.0, "total": 2, "cases": [case, case]}
    text = report.markdown({"part": "fast", "device": "cpu", "sections": {"beside": found}})
    assert "| c4 | bfloat16 | forward + backward |" in text
    assert "| 1.00× |" in text
