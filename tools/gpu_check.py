"""Checks and timings of the installed mmdcn on this machine's GPU, for tools/gpu_check.sh.

Each section runs in a process of its own, so that one that fails, hangs or breaks the GPU's context
takes no other with it. What is known so far is written after each section. Sections that compute
run once with each kind of kernels, as MMDCN_CUDA_KERNELS chooses them.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmdcn import machine
from mmdcn.errors import named_first_line
from mmdcn.files import write
from mmdcn.markdown import table

# What a section's name ends with where it runs with the kernels for tensor cores, and otherwise.
TENSOR_CORE = "_tensor_core"
KERNELS = {"": "simple kernels", TENSOR_CORE: "kernels for tensor cores"}

# Seconds that each section may take, in the order in which they run; and all of them together.
SECTIONS = {
    "environment": 60,
    "self_check": 60,
    "agreement": 90,
    "agreement_tensor_core": 90,
    "benchmark": 170,
    "benchmark_tensor_core": 170,
    "tests_tensor_core": 200,
    "tests": 200,
    "memcheck_tensor_core": 120,
    "racecheck_tensor_core": 120,
    "memcheck": 120,
    "racecheck": 120,
}
TOTAL_SECONDS = 1080

# Largest error that is allowed, relative to the largest element of the exact result (or to 1).
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# The error of float32 where it is multiplied in TF32, which has 11 bits.
TF32_TOLERANCE = 1e-3

# The 3 x 3 convolutions of R-50 at 800 x 1333.
STAGES = ("c3", "c4", "c5")
BATCHES = (1, 2, 8)
TIMED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDS = 11


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def on_tensor_cores() -> bool:
    """Whether this section's process runs the kernels for tensor cores."""
    return os.environ.get("MMDCN_CUDA_KERNELS") == "tensor_core"


def tolerance() -> dict[torch.dtype, float]:
    return {**TOLERANCE, torch.float32: TF32_TOLERANCE} if on_tensor_cores() else TOLERANCE


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --------------------------------------------------------------- sections, each in its own process


def environment(_: Path) -> dict:
    from mmdcn.ops import _library

    properties = torch.cuda.get_device_properties(0)
    result = {
        **machine.machine(torch.device("cuda")),
        **machine.versions(),
        "multiprocessors": properties.multi_processor_count,
        "shared_memory_kib": properties.shared_memory_per_block_optin // 1024,
        "mmdcn_folder": str(_library.FOLDER),
        "cuda_library_loaded": _library.cuda_is_loaded(),
    }
    smi = shutil.which("nvidia-smi")
    if smi:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        result["driver"] = answer.stdout.strip() or None
    assert result["cuda_library_loaded"], "mmdcn's CUDA library was not loaded"
    return result


def self_check(_: Path) -> dict:
    command = [sys.executable, "-m", "mmdcn.check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, f"python -m mmdcn.check ended with {result.returncode}"
    return {"output": result.stdout}


def draw_call(seed: int, dtype: torch.dtype, largest: int = 20) -> tuple[dict, dict]:
    """Arguments of one random call: tensors on the CPU, and stride, padding, dilation."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    if on_tensor_cores() and seed % 4:  # as these kernels take most such calls
        channels, groups, deform_groups = draw.choice(
            [(32, 1, 1), (64, 1, 1), (160, 1, 1), (64, 2, 1), (64, 1, 2), (128, 2, 4), (128, 4, 2)]
        )
        out_channels = groups * draw.choice([8, 40, 72, 136])
    else:
        channels = draw.choice([1, 3, 4, 12, 17, 40, 64, 70, 130])
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        groups, deform_groups = draw.choice(divisors), draw.choice(divisors)
        out_channels = groups * draw.choice([1, 5, 33, 70] if groups < 8 else [1, 3])
    kernel, stride, dilation = ([draw.randint(1, 3) for _ in range(2)] for _ in range(3))
    padding = [d * (k - 1) for d, k in zip(dilation, kernel)]
    size = [draw.randint(1, largest) for _ in range(2)]
    batch = draw.randint(1, 3)
    out_size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride)
    ]
    points = deform_groups * kernel[0] * kernel[1]
    wide = coordinate_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    offset = normal(batch, 2 * points, *out_size) * draw.choice([0.3, 2.0, 20.0])
    tensors = {
        "input": normal(batch, channels, *size).to(dtype),
        # Multiples of 2^-12 are added to the grid without rounding: a rounding that moves a sample
        # across an integer, where the gradient jumps, is no error.
        "offset": (offset * 4096).round().div(4096).to(wide),
        "weight": normal(out_channels, channels // groups, *kernel).to(dtype),
        "bias": normal(out_channels).to(dtype),
        "mask": normal(batch, points, *out_size).sigmoid().to(wide),
    }
    tensors["weight"] /= (channels // groups * kernel[0] * kernel[1]) ** 0.5
    if draw.random() < 0.5:
        tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    if draw.random() < 0.5:
        tensors["mask"] = None
    return tensors, {"stride": stride, "padding": padding, "dilation": dilation}


def output_and_gradients(function: Callable, tensors: dict, arguments: dict) -> dict[str, Tensor]:
    arguments = {name: tuple(pair) for name, pair in arguments.items()}
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()}
    output = function(**leaves, **arguments)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator).bfloat16()
    output.backward(grad_output.to(output.device, output.dtype))
    gradients = {f"grad_{n}": t.grad for n, t in leaves.items() if t is not None}
    return {"output": output.detach(), **gradients}


def convert(tensors: dict, *arguments) -> dict:
    return {n: None if t is None else t.to(*arguments) for n, t in tensors.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double().cpu() - expected.double().cpu()).abs().max()
    error = float(difference / expected.double().abs().max().clamp(min=1.0))
    return float("inf") if error != error else error


def agreement(_: Path) -> dict:
    """Largest errors of the GPU's results against the reference in float64, and the CPU's."""
    from mmdcn.ops import deform_conv2d, reference

    rows, failures = [], []
    for dtype, bound in tolerance().items():
        worst: dict[str, list[float]] = {}
        for seed in range(24):
            tensors, arguments = draw_call(seed, dtype)
            actual = output_and_gradients(deform_conv2d, convert(tensors, "cuda"), arguments)
            exact = output_and_gradients(
                reference.deform_conv2d, convert(tensors, torch.float64), arguments
            )
            cpu = output_and_gradients(deform_conv2d, tensors, arguments)
            for name, value in actual.items():
                errors = [relative_error(value, exact[name]), relative_error(value, cpu[name])]
                worst[name] = [max(pair) for pair in zip(errors, worst.get(name, [0.0, 0.0]))]
                if errors[0] > bound or errors[1] > 2 * bound:
                    failures.append(f"{dtype_name(dtype)} {name}, seed {seed}: {errors}")
        for name, (against_reference, against_cpu) in worst.items():
            row = {"dtype": dtype_name(dtype), "result": name, "bound": bound}
            rows.append({**row, "against_reference": against_reference, "against_cpu": against_cpu})
    print("\n".join(failures))
    return {"rows": rows, "failures": failures}


def tests(scratch: Path) -> dict:
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        return {"not_run": f"{' and '.join(missing)} not installed; see the agreement instead"}
    report = scratch / "tests.xml"
    report.unlink(missing_ok=True)  # the other kernels'
    command = [sys.executable, "-m", "pytest", "tests/cuda/test_cuda.py", "-m", "cuda", "-v"]
    command += ["-p", "no:cacheprovider", "--durations=10", f"--junitxml={report}"]
    process = subprocess.run(command, check=False)
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    broken = [
        f"{case.get('name')}: {(problem.get('message') or '').splitlines()[:1]}"
        for case in suite.iter("testcase")
        for problem in case
        if problem.tag in ("failure", "error")
    ]
    skipped = sorted(
        {
            f"{case.get('name')}: {problem.get('message')}"
            for case in suite.iter("testcase")
            for problem in case
            if problem.tag == "skipped"
        }
    )
    if process.returncode != 0 and not broken:
        broken = [f"pytest ended with {process.returncode}"]
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "failures": broken, "skipped_tests": skipped}


def sanitized(_: Path) -> dict:
    """The run under compute-sanitizer: small calls of every dtype, forward and backward."""
    from mmdcn.ops import deform_conv2d

    failures = []
    for dtype, bound in tolerance().items():
        for seed in range(100, 104):
            tensors, arguments = draw_call(seed, dtype, largest=9)
            # These offsets are far outside, not finite, and beyond every integer.
            offset = tensors["offset"].view(-1)
            offset[:5] = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, -1e10])[
                : len(offset)
            ]
            expected = output_and_gradients(deform_conv2d, tensors, arguments)
            # Sums in fixed point have fewer bits than in float64.
            for deterministic, least in ((False, 0.0), (True, 1e-10)):
                torch.use_deterministic_algorithms(deterministic)
                actual = output_and_gradients(deform_conv2d, convert(tensors, "cuda"), arguments)
                for name, value in actual.items():
                    error = relative_error(value, expected[name])
                    if error > 2 * max(bound, least):
                        failures.append(f"{dtype_name(dtype)} {name}, seed {seed}: {error}")
    torch.cuda.synchronize()
    print("the sanitized calls ended")
    return {"failures": failures}


def run_sanitizer(tool: str, scratch: Path) -> dict:
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.path.join(place, "bin", "compute-sanitizer") for place in places if place]
    program = next(filter(None, map(shutil.which, ["compute-sanitizer", *candidates])), None)
    if program is None:
        return {"not_run": "compute-sanitizer was not found"}
    result_file = scratch / "sanitized.json"
    result_file.unlink(missing_ok=True)  # the other kernels'
    command = [program, "--tool", tool, "--report-api-errors", "no", sys.executable, __file__]
    section = "sanitized" + (TENSOR_CORE if on_tensor_cores() else "")
    command += ["--section", section, "--result", str(result_file)]
    # Without torch's memory pool every tensor is an allocation with borders that can be checked.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    output = process.stdout + process.stderr
    print(output)
    summary = re.search(r"SUMMARY: (\d+) .*", output)
    if "the sanitized calls ended" not in output and summary is None:
        return {"not_run": f"{tool} does not run here: {' '.join(output.split())[-300:]}"}
    failures = [] if summary and summary.group(1) == "0" else [(summary or ["no summary"])[0]]
    if result_file.is_file():
        failures += json.loads(result_file.read_text()).get("failures", [])
    else:
        failures.append("the calls did not end")
    return {"summary": summary.group(0) if summary else None, "failures": failures}


def memcheck(scratch: Path) -> dict:
    return run_sanitizer("memcheck", scratch)


def racecheck(scratch: Path) -> dict:
    return run_sanitizer("racecheck", scratch)


def deterministically(function: Callable) -> Callable:
    def call():
        torch.use_deterministic_algorithms(True)
        try:
            return function()
        finally:
            torch.use_deterministic_algorithms(False)

    return call


def benchmark_row(stage: str, batch: int, dtype: torch.dtype, channels_last: bool) -> dict:
    from mmdcn import timing
    from mmdcn.benchmark import cases, implementations, memory

    layout = "channels_last" if channels_last else "nchw"
    shape = next(case for case in cases.SHAPES["r50"] if case.name == stage)
    case = dataclasses.replace(shape, batch=batch, layout=layout, dtype=dtype_name(dtype))
    device = torch.device("cuda")
    tensors = cases.make_tensors(case, device, offset_std=2.0)
    row = {
        "stage": stage,
        "batch": batch,
        "dtype": dtype_name(dtype),
        "layout": "channels_last" if channels_last else "contiguous",
        "forward_ms": {},
        "forward_backward_ms": {},
        "forward_peak_mb": {},
        "forward_backward_peak_mb": {},
        "errors": {},
    }
    compared = {
        "mmdcn": implementations.Mmdcn(),
        "conv2d": implementations.Dense(),
        "torchvision": implementations.Torchvision(),
    }
    inference, training = {}, {}

    def bind(implementation, tensors: dict) -> implementations.Bound:
        bound = implementation.bind(case, tensors)
        bound.infer(), bound.train()
        return bound

    for name, implementation in compared.items():
        try:
            bound = bind(implementation, tensors)
            row["forward_peak_mb"][name] = memory.cuda_peak(bound.infer) / 1e6
            bound.drop_gradients()
            row["forward_backward_peak_mb"][name] = memory.cuda_peak(bound.train) / 1e6
        except Exception as error:
            row["errors"][name] = named_first_line(error)
            if name == "mmdcn":
                raise
            continue
        inference[name], training[name] = timing.Call(bound.infer), timing.Call(bound.train)
        if name == "mmdcn":
            training["mmdcn, deterministic"] = timing.Call(deterministically(bound.train))
            still = {**tensors, "offset": torch.zeros_like(tensors["offset"])}
            bound = bind(implementation, still)
            inference["mmdcn, zero offsets"] = timing.Call(bound.infer)
            training["mmdcn, zero offsets"] = timing.Call(bound.train)
    budget = timing.Budget(seconds=math.inf, most=ROUNDS)
    for key, calls in (("forward_ms", inference), ("forward_backward_ms", training)):
        samples = timing.interleave(calls, device, budget)
        row[key] = {name: timing.median(taken) for name, taken in samples.items()}
    return row


def benchmark(scratch: Path) -> dict:
    # Dense convolution runs at its best, and in the same arithmetic as ours.
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "tf32" if on_tensor_cores() else "ieee"
    deadline = time.monotonic() + SECTIONS["benchmark"] - 20
    result = {"rows": [], "failures": [], "complete": True}
    for batch in BATCHES:
        for dtype in TIMED_DTYPES:
            for channels_last in (False, True):
                for stage in STAGES:
                    if time.monotonic() > deadline:
                        result["complete"] = False
                        return result
                    try:
                        row = benchmark_row(stage, batch, dtype, channels_last)
                        result["rows"].append(row)
                        print(json.dumps(row), flush=True)
                    except Exception:
                        name = f"{stage}, batch {batch}, {dtype_name(dtype)}, {channels_last=}"
                        result["failures"].append(f"{name}: {traceback.format_exc(limit=3)}")
                    # This writes what is measured so far, which then survives whatever comes next.
                    name = "benchmark" + (TENSOR_CORE if on_tensor_cores() else "")
                    write(scratch / f"{name}.json", json.dumps(result))
    return result


# ---------------------------------------------------------------------- the report, in the parent


def benchmark_table(rows: list[dict]) -> list[str]:
    def times(row: dict, key: str) -> list[str]:
        ours, dense, torchvision = (
            row[key].get(name) for name in ("mmdcn", "conv2d", "torchvision")
        )
        columns = ["—" if ms is None else f"{ms:.3f}" for ms in (ours, dense, torchvision)]
        columns.append("—" if None in (ours, dense) else f"{ours / dense:.2f}")
        columns.append("—" if None in (ours, torchvision) else f"{torchvision / ours:.2f}")
        return columns

    def peaks(row: dict) -> str:
        peak = row["forward_backward_peak_mb"]
        return " / ".join(
            f"{peak[name]:.0f}" if name in peak else "—"
            for name in ("mmdcn", "conv2d", "torchvision")
        )

    header = ["stage", "batch", "dtype", "layout"]
    for direction in ("fwd", "fwd+bwd"):
        header += [f"{direction} mmdcn", "conv2d", "torchvision", "× conv2d", "torchvision ÷ mmdcn"]
    header.append("peak MB fwd+bwd, mmdcn / conv2d / torchvision")
    return table(
        header,
        [
            [row["stage"], row["batch"], row["dtype"], row["layout"]]
            + times(row, "forward_ms")
            + times(row, "forward_backward_ms")
            + [peaks(row)]
            for row in rows
        ],
        left=4,
    )


def kernels_table(simple: list[dict], tensor_core: list[dict]) -> list[str]:
    """Both kinds of kernels side by side: what decides which of them is the default."""

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in ("stage", "batch", "dtype", "layout"))

    def ms(row: dict, direction: str, name: str = "mmdcn") -> float | None:
        return row.get(direction, {}).get(name)

    def ratio(a: float | None, b: float | None) -> str:
        return "—" if None in (a, b) else f"{a / b:.2f}"

    header = ["stage", "batch", "dtype", "layout"]
    for direction in ("fwd", "fwd+bwd"):
        header += [f"{direction} simple", "tensor core", "simple ÷ tensor core", "× conv2d"]
        header.append("zero offsets × conv2d")
    header.append("deterministic ÷ default")
    others = {key(row): row for row in simple}
    lines = []
    for row in tensor_core:
        other = others.get(key(row), {})
        line = list(key(row))
        for direction in ("forward_ms", "forward_backward_ms"):
            ours, before = ms(row, direction), ms(other, direction)
            dense = ms(row, direction, "conv2d")
            line += ["—" if value is None else f"{value:.3f}" for value in (before, ours)]
            line += [ratio(before, ours), ratio(ours, dense)]
            line.append(ratio(ms(row, direction, "mmdcn, zero offsets"), dense))
        training = "forward_backward_ms"
        line.append(ratio(ms(row, training, "mmdcn, deterministic"), ms(row, training)))
        lines.append(line)
    return table(header, lines, left=4)


def markdown(report: dict) -> str:
    sections = report["sections"]
    lines = ["# mmdcn on a GPU", ""]
    facts = sections.get("environment", {}).get("result", {})
    lines += table(["", ""], facts.items(), left=2)
    lines += ["", "## Checks", ""]
    rows = []
    for name, section in sections.items():
        result = section.get("result", {})
        keys = ("not_run", "summary", "passed", "failures", "skipped_tests", "complete", "error")
        found = {**result, **section}
        said = [
            f"{key}: {found[key]}".replace("|", "/").replace("\n", " ")
            for key in keys
            if key in found and found[key] not in (None, [], 0)
        ]
        seconds = f"{section['seconds']:.0f} s"
        rows.append([name, section["status"], seconds, "; ".join(said)[:1500]])
    lines += table(["section", "status", "time", ""], rows, left=4)

    for suffix in ("", TENSOR_CORE):
        agreement_rows = rows_of(sections, f"agreement{suffix}")
        if not agreement_rows:
            continue
        lines += ["", f"## Largest errors, {KERNELS[suffix]}, relative to the largest element", ""]
        header = ["dtype", "result", "against the reference in float64", "against the CPU", "bound"]
        lines += table(
            header,
            [
                [row["dtype"], row["result"], f"{row['against_reference']:.1e}"]
                + [f"{row['against_cpu']:.1e}", row["bound"]]
                for row in agreement_rows
            ],
            left=2,
        )
    tensor_core_rows = rows_of(sections, f"benchmark{TENSOR_CORE}")
    if tensor_core_rows:
        lines += [
            *("", "## Which kernels", ""),
            "Times in milliseconds. conv2d is that of the run with the kernels for tensor cores, "
            "so float32 is in TF32 there, and exact with the simple kernels.",
            "",
        ]
        lines += kernels_table(rows_of(sections, "benchmark"), tensor_core_rows)
    for suffix, arithmetic in (("", "without TF32"), (TENSOR_CORE, "float32 in TF32, as ours")):
        benchmark_rows = rows_of(sections, f"benchmark{suffix}")
        if not benchmark_rows:
            continue
        lines += [
            *("", f"## Times in milliseconds, {KERNELS[suffix]}", ""),
            f"Medians of {ROUNDS} interleaved runs, by CUDA events, caches warm. 3×3, stride 1, "
            "padding 1, R-50 at 800×1333, offsets ~ N(0, 2²), mask, no bias. Backward: every "
            "gradient. conv2d is cuDNN's dense convolution, its algorithm chosen by timing, "
            f"{arithmetic}.",
            "",
        ]
        lines += benchmark_table(benchmark_rows)
    return "\n".join(lines) + "\n"


def rows_of(sections: dict, name: str) -> list[dict]:
    return sections.get(name, {}).get("result", {}).get("rows", [])


def run_section(name: str, seconds: float, scratch: Path, log: Path) -> dict:
    result_file = scratch / f"{name}.json"
    command = [sys.executable, __file__, "--section", name, "--result", str(result_file)]
    started = time.monotonic()
    error = None
    with log.open("a") as stream:
        stream.write(f"\n===== {name}\n")
        stream.flush()
        # A session of its own, so that whatever a section started ends with it.
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if process.wait(seconds) != 0:
                error = f"ended with {process.returncode}; see {log.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            error = f"not done after {seconds:.0f} seconds"
    section = {"seconds": time.monotonic() - started, "result": {}}
    if result_file.is_file():
        section["result"] = json.loads(result_file.read_text())
    if error is None and not section["result"]:
        error = f"gave no result; see {log.name}"
    if error is not None:
        section["error"] = error
    failed = error is not None or section["result"].get("failures")
    incomplete = not section["result"].get("complete", True)
    not_run = "not_run" in section["result"]
    section["status"] = (
        "failed" if failed else "incomplete" if incomplete else "not run" if not_run else "passed"
    )
    return section


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the report")
    parser.add_argument(
        "--sections",
        type=lambda names: names.split(","),
        help=f"run these only, separated by commas: {', '.join(SECTIONS)}",
    )
    parser.add_argument("--section", help="run one section in this process (used internally)")
    parser.add_argument("--result", type=Path, help="where that section's result goes")
    args = parser.parse_args()

    if args.section:
        tensor_core = args.section.endswith(TENSOR_CORE)
        os.environ["MMDCN_CUDA_KERNELS"] = "tensor_core" if tensor_core else "simple"
        section = globals()[args.section.removesuffix(TENSOR_CORE)]
        write(args.result, json.dumps(section(args.result.parent)))
        return 0
    if args.out is None:
        parser.error("--out is needed")
    unknown = set(args.sections or ()) - set(SECTIONS)
    if unknown:
        parser.error(f"--sections: expected some of {', '.join(SECTIONS)}, got {sorted(unknown)}")

    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "gpu_check.log"
    log.unlink(missing_ok=True)
    scratch = Path.cwd() / "results"
    scratch.mkdir(exist_ok=True)
    report = {"sections": {}}
    deadline = time.monotonic() + TOTAL_SECONDS
    for name, seconds in SECTIONS.items():
        if args.sections and name not in args.sections:
            continue
        left = deadline - time.monotonic()
        if left < 10:
            section = {"status": "failed", "seconds": 0.0, "error": "no time was left"}
        else:
            print(f"gpu_check: {name} ...", end=" ", flush=True)
            section = run_section(name, min(seconds, left), scratch, log)
            print(f"{section['status']} ({section['seconds']:.0f} s)", flush=True)
        report["sections"][name] = section
        write(args.out / "gpu_check.json", json.dumps(report, indent=2) + "\n")
        write(args.out / "gpu_check.md", markdown(report))
    print()
    print((args.out / "gpu_check.md").read_text())
    failed = [n for n, s in report["sections"].items() if s["status"] in ("failed", "incomplete")]
    if failed:
        print(f"gpu_check: {', '.join(failed)} did not pass; see {log}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
