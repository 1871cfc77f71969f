"""The benchmark of the operator: its peers, its samples, and that wrong results are not timed."""

import importlib.util

import pytest
import torch

pytest.importorskip("mmcv")

from mmdcn import plugin, timing
from mmdcn.benchmark import BenchmarkError, cases, implementations, operators, tables
from mmdcn.benchmark.implementations import Dense, Mmcv, Mmdcn, OnnxRuntime, OpenVino
from tests.kernel_calls import KernelCalls

CPU = torch.device("cpu")
QUICK = timing.Budget(seconds=0.001, fewest=2, most=3)


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    plugin.install()
    monkeypatch.setattr(operators, "_MATRIX_SIZE", {"cpu": 64})
    monkeypatch.setattr(operators, "_COPY_BYTES", {"cpu": 2**20})


def settings(*expanded, **more) -> operators.Settings:
    options = {"budget": QUICK, "measure_memory": False}
    return operators.Settings(cases.expand(*expanded), **{**options, **more})


def run(chosen: operators.Settings) -> dict:
    result = {}
    operators.run(chosen, result)
    return result


@pytest.mark.parametrize("version, calls", [("v1", 4), ("v2", 2)])
def test_mmcv_runs_its_own_kernels_while_the_plugin_is_installed(version, calls):
    case = cases.expand(["1x4x8x8"], [version], ["nchw"], ["float32"])[0]
    tensors = cases.make_tensors(case, CPU, 2.0)
    assert plugin.report().installed
    with KernelCalls() as counted:
        bound = Mmcv().bind(case, tensors)
        bound.infer(), bound.train()
    # v1 has one kernel for the gradient of the input and the offset, and one for the weight's.
    assert (counted.forward, counted.backward, counted.mmcv) == (0, 0, calls + (version == "v2"))
    assert set(bound.gradients()) == set(bound.leaves) == set(case.shapes()) - {"output"}
    with KernelCalls() as counted:
        bound = Mmdcn().bind(case, tensors)
        bound.infer(), bound.train()
    assert (counted.forward, counted.backward, counted.mmcv) == (2, 1, 0)


@pytest.mark.parametrize("runtime", [OnnxRuntime, OpenVino])
def test_runtimes_compute_every_variant(runtime):
    problem = runtime().missing(CPU)
    if problem is not None:
        pytest.skip(problem)
    variants = [
        cases.Case("", 2, 8, 6, 9, 7, version="v1"),
        cases.Case("", 1, 8, 8, 9, 7, stride=2, groups=2, deform_groups=4),
        cases.Case("", 1, 8, 8, 9, 7, kernel=5, padding=2),
        cases.Case("", 1, 8, 8, 9, 7, dilation=2, padding=2),
    ]
    for case in variants:
        tensors = cases.make_tensors(case, CPU, 2.0)
        output = runtime().bind(case, tensors).infer()
        torch.testing.assert_close(output, Mmdcn().bind(case, tensors).infer())


def test_every_implementation_has_its_samples():
    chosen = settings(
        ["1x8x9x10", "2x4x8x8:6"], ["v1", "v2"], ["nchw", "channels_last"], ["float32"]
    )
    result = run(chosen)
    assert result["complete"]
    assert len(result["cases"]) == 8
    for entry in result["cases"]:
        peers = {"dense"} if entry["layout"] == "channels_last" else {"dense", "mmcv"}
        available = set(result["implementations"])
        forward, both = entry["times"]["forward"], entry["times"]["forward_backward"]
        assert set(both) == {"mmdcn"} | peers
        assert set(forward) - set(both) == available & {"onnxruntime", "openvino"} - set(
            entry["cannot"]
        )
        assert set(forward) | set(entry["cannot"]) == available
        for samples in [*forward.values(), *both.values()]:
            assert len(samples) in (2, 3) and all(ms > 0 for ms in samples)
        for direction, passes in (("forward", 1), ("forward_backward", 3)):
            rates = result["rates"]["gflop_per_s"]["float32"]
            floor = entry["floor_ms"][direction]
            assert floor["multiply"] == pytest.approx(passes * entry["flops"] / rates / 1e6)


def test_each_pass_adds_its_part_of_the_samples(monkeypatch):
    drawn = []

    def make_tensors(case, *rest):
        drawn.append(case.label)
        return cases.make_tensors(case, *rest)

    monkeypatch.setattr(operators, "make_tensors", make_tensors)
    chosen = settings(["1x8x9x10", "1x4x8x8"], ["v2"], ["nchw"], ["float32"], peers=["dense"])
    chosen.budget, chosen.passes = timing.Budget(100, 1, 9), 4
    result = run(chosen)
    first, second = (case.label for case in chosen.cases)
    # What comes before is for the machine's rates.
    assert drawn[-8:] == [first, second] * 4
    assert result["settings"]["passes"] == 4
    for entry in result["cases"]:
        for times in entry["times"].values():
            assert {name: len(samples) for name, samples in times.items()} == {
                "mmdcn": 12,
                "dense": 12,
            }


def test_float64_is_compared_in_float64(monkeypatch):
    monkeypatch.setitem(operators.TOLERANCE, "float64", 1e-13)
    result = run(settings(["1x4x8x8"], ["v1", "v2"], ["nchw"], ["float64"], peers=[]))
    assert result["complete"]


def test_half_precision_is_timed_beside_float32(monkeypatch):
    class Unknown(Exception):
        pass

    def not_implemented(self, case, **tensors):
        raise Unknown(f"not for {case.dtype}\nand so on")

    monkeypatch.setattr(Mmcv, "compute", not_implemented)
    result = run(settings(["1x8x9x10"], ["v2"], ["nchw"], ["bfloat16"], peers=["dense", "mmcv"]))
    (entry,) = result["cases"]
    assert set(entry["times"]["forward_backward"]) == {"mmdcn", "mmdcn float32", "dense"}
    assert entry["cannot"]["mmcv"] == "Unknown: not for bfloat16"


def test_one_thread_gives_the_same_bits(monkeypatch):
    options = [["1x8x20x20"], ["v2"], ["nchw"], ["float32"]]
    chosen = settings(*options, peers=[], scaling=True)
    (entry,) = run(chosen)["cases"]
    assert entry["same_on_one_thread"] is True
    assert "mmdcn, 1 thread" in entry["times"]["forward_backward"]

    def inexact(self, case, **tensors):
        return Mmdcn.compute(self, case, **tensors) * (1 + 1e-6)

    monkeypatch.setattr(implementations.MmdcnOneThread, "compute", inexact)
    (entry,) = run(chosen)["cases"]
    assert entry["same_on_one_thread"] is False


def test_peers_that_are_not_installed_are_named(monkeypatch):
    find_spec = importlib.util.find_spec
    missing = {"torchvision", "onnx"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name)
    )
    result = run(settings(["1x4x8x8"], ["v2"], ["nchw"], ["float32"]))
    assert result["left_out"]["torchvision"] == "torchvision is not installed"
    assert "onnx" in result["left_out"]["onnxruntime"]
    assert result["implementations"] == ["mmdcn", "dense", "mmcv"]


@pytest.mark.parametrize("kind", [Mmdcn, Mmcv])
@pytest.mark.parametrize(
    "spoil, what",
    [
        (lambda output: output * 1.01, "output"),
        (lambda output: output * float("nan"), "output"),
        # Of the last image only.
        (lambda output: torch.cat([output[:-1], output[-1:].roll(1, -1)]), "output"),
    ],
    ids=["scaled", "NaN", "last image"],
)
def test_wrong_outputs_are_not_timed(monkeypatch, kind, spoil, what):
    compute = kind.compute
    monkeypatch.setattr(kind, "compute", lambda *args, **tensors: spoil(compute(*args, **tensors)))
    chosen = settings(["3x4x8x8"], ["v2"], ["nchw"], ["float32"], peers=["mmcv"])
    with pytest.raises(BenchmarkError, match=f"{kind.name} computes a wrong {what} for 3, 4→4"):
        run(chosen)


def test_wrong_gradients_are_not_timed(monkeypatch):
    compute = Mmcv.compute

    def with_wrong_gradient(self, case, **tensors):
        tensors["mask"].register_hook(lambda grad: 1.5 * grad)
        return compute(self, case, **tensors)

    monkeypatch.setattr(Mmcv, "compute", with_wrong_gradient)
    chosen = settings(["1x4x8x8"], ["v2"], ["nchw"], ["float32"], peers=["mmcv"])
    with pytest.raises(BenchmarkError, match=r"mmcv computes a wrong gradient of mask.*0\.5"):
        run(chosen)


@pytest.mark.parametrize("dtype, peers", [("float32", ["dense"]), ("float16", [])])
def test_the_best_rate_is_what_a_dense_convolution_reached(monkeypatch, dtype, peers):
    monkeypatch.setattr(operators, "_MATRIX_SIZE", {"cpu": 4})
    result = run(settings(["1x64x32x32"], ["v2"], ["nchw"], [dtype], peers=peers))
    rates, (entry,) = result["rates"], result["cases"]
    assert "dense convolution of 1, 64→64" in rates["gflop_per_s_from"][dtype]
    (samples,) = (s for name, s in rates["samples_ms"].items() if "convolution" in name)
    reached = [entry["flops"] / timing.median(samples) / 1e6]
    if peers:
        reached += [
            passes * entry["flops"] / timing.median(entry["times"][direction]["dense"]) / 1e6
            for direction, passes in (("forward", 1), ("forward_backward", 3))
        ]
    assert rates["gflop_per_s"][dtype] == pytest.approx(max(reached))


def test_memory_is_asked_of_each_implementation_once(monkeypatch):
    asked = []

    def measure(name, problems, offset_std, threads):
        asked.append((name, [case.label for case in problems]))
        answers = [{"forward": 1000 * case.batch, "forward_backward": 2000} for case in problems]
        return [*answers[:-1], {"cannot": "it died"}]

    monkeypatch.setattr(operators.memory, "measure_on_cpu", measure)
    chosen = settings(
        *(["2x4x8x8"], ["v2"], ["nchw"], ["bfloat16"]), peers=["dense"], measure_memory=True
    )
    result = run(chosen)
    labels = ["2, 4→4, 8×8", "8, 4→4, 8×8, batch × 4", "2, 4→4, 16×16, image × 4"]
    assert asked == [("mmdcn", labels), ("dense", labels)]
    entries = [*result["cases"], *result["memory_growth"]]
    assert [entry["extra_bytes"]["forward"] for entry in entries] == [
        {"mmdcn": 2000, "dense": 2000},
        {"mmdcn": 8000, "dense": 8000},
        {},
    ]
    assert entries[2]["memory_cannot"] == {"mmdcn": "it died", "dense": "it died"}
    rows = [line for line in tables.operator_lines(result) if line.startswith("| 8, 4→4")]
    assert rows == ["| 8, 4→4, 8×8, batch × 4 | v2 | 0.0 / 0.0 | 0.0 / 0.0 |"]


def test_dense_convolution_has_the_same_arguments():
    case = cases.Case("", 1, 8, 6, 9, 7, kernel=5, stride=2, padding=2, groups=2)
    tensors = cases.make_tensors(case, CPU, 0.0)
    dense = Dense().bind(case, tensors).infer()
    tensors.pop("mask")
    torch.testing.assert_close(dense, Mmdcn().bind(case, tensors).infer())
