"""Sections that run other programs: pytest, compute-sanitizer, ncu, another wheel of mmdcn."""

import csv
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree
from pathlib import Path

import torch

from mmdcn import machine
from mmdcn.ops import _devices, _library

from . import other_mmdcn, processes, smoke
from .profiling import short_name
from .sections import SECTIONS, Case, NotRun, Wrong
from .settings import Settings


def find(program: str) -> str | None:
    """The path of a program of a CUDA toolkit, if there is one."""
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.path.join(place, "bin", program) for place in places if place]
    return next(filter(None, map(shutil.which, [program, *candidates])), None)


# ------------------------------------------------------------------------------ what is installed


def environment(settings: Settings) -> list[Case]:
    return [Case("machine and versions", functools.partial(_facts, settings))]


def _facts(settings: Settings) -> dict:
    facts = {**machine.machine(settings.target), **machine.versions()}
    facts["mmdcn's folder"] = str(_library.FOLDER)
    facts["CUDA library loaded"] = _library.cuda_is_loaded()
    for name in ("compute-sanitizer", "ncu"):
        facts[name] = find(name) or "not found"
    if settings.device == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(settings.target)
    facts["multiprocessors"] = properties.multi_processor_count
    facts["L2 cache, MiB"] = getattr(properties, "L2_cache_size", 0) / 2**20
    if (smi := shutil.which("nvidia-smi")) is not None:
        query = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        command = [smi, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
        _, output = processes.run(command, settings.file("nvidia-smi.log"))
        names = ("driver", "largest clock", "largest memory clock", "power limit")
        facts |= dict(zip(names, (part.strip() for part in output.split(","))))
    serves = _devices.service(settings.target)
    facts["what computes"] = _devices.describe(settings.target, serves)
    if not serves.kernels:
        raise Wrong([serves.problem], facts)
    return facts


def self_test(settings: Settings) -> list[Case]:
    return [Case("python -m mmdcn.check", functools.partial(_self_test, settings))]


def _self_test(settings: Settings) -> dict:
    command = [sys.executable, "-m", "mmdcn.check"]
    status, output = processes.run(command, settings.file("check.log"))
    result = {"output": output}
    if status != 0:
        raise Wrong([f"it ended with {status}"], result)
    return result


# ---------------------------------------------------------------------------------------- pytest


def tests(settings: Settings) -> list[Case]:
    """The tests that need a GPU, a file each."""
    if settings.tests is None:
        files = []
    else:
        files = sorted((Path(settings.tests) / "tests" / "cuda").glob("test_gpu_*.py"))
        # What is tested of this program itself needs no GPU.
        files = [path for path in files if not path.name.startswith("test_gpu_check")]
    if not files:
        return [Case("pytest", functools.partial(_raise, NotRun("no tests are at hand")))]
    if settings.tiny:  # All are skipped without a GPU, and one file shows that as well as many.
        files = files[:1]
    return [Case(path.name, functools.partial(_pytest, settings, path)) for path in files]


def _raise(exception: Exception) -> dict:
    raise exception


def _pytest(settings: Settings, path: Path) -> dict:
    missing = [name for name in ("pytest", "hypothesis") if not importlib.util.find_spec(name)]
    if missing:
        raise NotRun(f"{' and '.join(missing)} not installed; see the random problems instead")
    report = settings.file(f"{path.stem}.xml")
    command = [sys.executable, "-m", "pytest", path.relative_to(settings.tests), "-m", "cuda"]
    command += ["-q", "-p", "no:cacheprovider", "--durations=10", f"--junitxml={report}"]
    log = settings.file(f"{path.stem}.log")
    status, output = processes.run(command, log, cwd=settings.tests)
    if not report.is_file():
        raise Wrong([f"pytest ended with {status}: {' '.join(output.split())[-300:]}"], {})
    result = _counts(report)
    if status not in (0, 5) or result["failures"]:
        raise Wrong(result["failures"] or [f"pytest ended with {status}"], result)
    return result


def _counts(report: Path) -> dict:
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    result = {key: int(suite.get(key)) for key in ("tests", "skipped")}
    said = {"failures": [], "reasons_for_skipping": []}
    for case in suite.iter("testcase"):
        for problem in case:
            message = (problem.get("message") or "").strip().partition("\n")[0]
            if problem.tag in ("failure", "error"):
                said["failures"].append(f"{case.get('name')}: {message[:300]}")
            elif problem.tag == "skipped" and message not in said["reasons_for_skipping"]:
                said["reasons_for_skipping"].append(message)
    return result | said


# ----------------------------------------------------------------------------- compute-sanitizer


def sanitizers(settings: Settings) -> list[Case]:
    return [
        Case(tool, functools.partial(_sanitize, settings, tool))
        for tool in ("memcheck", "racecheck")
    ]


def _sanitize(settings: Settings, tool: str) -> dict:
    program = find("compute-sanitizer")
    if program is None:
        raise NotRun("compute-sanitizer was not found")
    records = settings.file(f"{tool}.records")
    records.unlink(missing_ok=True)
    command = [program, "--tool", tool, "--report-api-errors", "no"]
    # It is some ten times slower, and the kernels of bfloat16 and float64 are built like these.
    command += _worker(settings, "smoke", records, 0, smoke.OF_TWO_DTYPES)
    # Without torch's memory pool every tensor is an allocation with borders that can be checked.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _, output = processes.run(command, settings.file(f"{tool}.log"), env=environment)
    summary = re.search(r"SUMMARY: (\d+) .*", output)
    done = records.read_text().count('"ended"') if records.is_file() else 0
    result = {"cases": done, "summary": summary.group(0) if summary else None}
    if summary is None and not done:
        raise NotRun(f"{tool} does not run here: {' '.join(output.split())[-300:]}")
    if summary is None or summary.group(1) != "0":
        lines = [line for line in output.splitlines() if line.startswith("===")]
        raise Wrong([result["summary"] or "it did not end"], result | {"output": lines[:60]})
    return result


def _worker(settings: Settings, section: str, records: Path, first: int, count: int) -> list:
    command = [sys.executable, "-m", f"{__package__}.worker", "--settings", settings.to_json()]
    command += ["--section", section, "--records", records]
    return [*command, "--first", str(first), "--count", str(count)]


# ---------------------------------------------------------------------------------------- counters

#: What ncu counts of our kernels, and what that is.
COUNTERS = {
    "gpu__time_duration.sum": "time, ns",
    "l1tex__t_sector_hit_rate.pct": "L1 hits, %",
    "lts__t_sector_hit_rate.pct": "L2 hits, %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "lts__t_sectors_op_red.sum": "sectors of reductions",
    "dram__bytes.sum": "DRAM, bytes",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue, %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor pipes, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
}


def counters(settings: Settings) -> list[Case]:
    """ncu's counters of our kernels, for some rows of the convolution's section."""
    names = [case.name for case in SECTIONS["passes"].list_cases(settings)]
    return [
        Case(name, functools.partial(_count, settings, number))
        for number, name in enumerate(names)
        if number < (1 if settings.tiny else 2)
    ]


def _count(settings: Settings, number: int) -> dict:
    program = find("ncu")
    if program is None:
        raise NotRun("ncu was not found")
    command = [program, "--csv", "--metrics", ",".join(COUNTERS), "--launch-count", "40"]
    # Not the launches that find out which products are right here, and warm up.
    command += ["--profile-from-start", "off"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:mmdcn::cuda"]
    records = settings.file(f"ncu {number}.records")
    command += _worker(settings, "passes", records, number, 1)
    status, output = processes.run(command, settings.file(f"ncu {number}.log"))
    found = counters_of(output)
    if not found:
        raise NotRun(f"ncu counted nothing ({status}): {' '.join(output.split())[-300:]}")
    return {"kernels": found}


def counters_of(output: str) -> list[dict]:
    """The counters of each kernel, from ncu's CSV: of the last launch with its name."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(lines[start:]):
        metric = row.get("Metric Name")
        if metric in COUNTERS:
            kernel = kernels.setdefault(short_name(row["Kernel Name"]), {})
            kernel[COUNTERS[metric]] = row["Metric Value"]
    return [{"kernel": name, **values} for name, values in kernels.items()]


# --------------------------------------------------------------------------------- another wheel


def beside(settings: Settings) -> list[Case]:
    """The same calls by this mmdcn and by another, in processes of their own, one after another."""
    if settings.beside is None:
        reason = NotRun("no other wheel was named by --beside")
        return [Case("another mmdcn", functools.partial(_raise, reason))]
    folders = {"this": str(_library.FOLDER.parent), "another": settings.beside}
    return [
        Case(f"{which} mmdcn", functools.partial(_time_mmdcn, settings, which, folder))
        for which, folder in folders.items()
    ]


def _time_mmdcn(settings: Settings, which: str, folder: str) -> dict:
    result = settings.file(f"{which} mmdcn.json")
    order = {
        "cases": [
            vars(shape) | {"batch": 2, "dtype": dtype}
            for dtype in ("float16", "float32", "bfloat16")
            for shape in settings.shapes
        ],
        "device": settings.device,
        "budget": vars(settings.budget),
        "result": str(result),
    }
    source = Path(other_mmdcn.__file__).read_text()
    # Not by its path, whose folder's modules would then come before all others.
    command = [sys.executable, "-c", source, json.dumps(order)]
    environment = {**os.environ, "PYTHONPATH": folder}
    log = settings.file(f"{which} mmdcn.log")
    status, output = processes.run(command, log, env=environment, cwd=settings.folder)
    found = json.loads(result.read_text()) if result.is_file() else {"rows": []}
    if status != 0:
        said = " ".join(output.split())[-300:]
        raise Wrong([f"it ended with {status}: {said}"], found)
    return found
