"""The memory that a call takes at its peak, beyond what goes in and comes out.

On CUDA torch's allocator counts it. On the CPU, under Linux, the kernel does: it keeps the highest
resident size of a process, and sets it back when asked to. For that each implementation gets a
process of its own, whose allocator gives memory back as soon as it is freed.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import BenchmarkError, cases
from .implementations import Bound, OnnxRuntime, all_implementations

# glibc: blocks from this size are mapped, and unmapped when freed; nothing is kept at the top of
# the heap, and there is one heap.
_GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size ("high water mark")


def cuda_peak(call: Callable[[], object]) -> int:
    """Bytes that a call takes on the GPU at its peak, with what it returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(call: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's resident memory at its peak."""
    gc.collect()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError as error:
        raise BenchmarkError(f"this system does not reset the peak of memory: {error}") from error
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise BenchmarkError(f"/proc/self/status has no {field}")


def can_measure(device: torch.device) -> bool:
    """Whether this system can measure memory."""
    return device.type == "cuda" or _CLEAR.exists()


def extra_bytes(bound: Bound, direction: str, device: torch.device) -> int:
    """The memory of one call at its peak, less its output and gradients."""
    step = bound.infer if direction == "forward" else bound.train
    kept = []

    def call() -> None:
        kept.append(step())

    step()
    bound.drop_gradients()
    peak = cuda_peak(call) if device.type == "cuda" else resident_peak(call)
    results = [*kept, *bound.gradients().values()]
    bound.drop_gradients()
    return max(0, peak - sum(tensor.nbytes for tensor in results))


def measure_apart(module: str, order: dict) -> list[dict[str, int | str]]:
    """Answers of a module that is run with an order, in a process of its own.

    Its function `measure` is given the order, and gives the answers (:mod:`~.apart`). Where its
    process ends too soon, the last answer's ``cannot`` says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        process = subprocess.run(
            [sys.executable, "-m", f"{__package__}.apart", module],
            input=json.dumps({**order, "result": str(result)}),
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | _GIVE_BACK,
        )
        answers = json.loads(result.read_text()) if result.is_file() else []
    if process.returncode != 0:
        said = (process.stderr.strip().splitlines() or ["no message"])[-1]
        answers.append({"cannot": f"its process ended with {process.returncode}: {said}"})
    return answers


def measure_on_cpu(
    name: str, problems: list[cases.Case], offset_std: float, threads: int
) -> list[dict[str, int | str]]:
    """:func:`extra_bytes` of an implementation, by direction, for each case in turn."""
    order = {"name": name, "cases": [vars(case) for case in problems]}
    return measure_apart(__name__, {**order, "offset_std": offset_std, "threads": threads})


def measure(order: dict) -> Iterator[dict[str, int | str]]:
    """The answers to the order of :func:`measure_on_cpu`."""
    device = torch.device("cpu")
    kind = all_implementations()[order["name"]]
    # What an arena keeps after the first call would hide what the second one needs.
    implementation = kind(keep_memory=False) if kind is OnnxRuntime else kind()
    for fields in order["cases"]:
        case = cases.Case(**fields)
        tensors = cases.make_tensors(case, device, offset_std=order["offset_std"])
        bound = implementation.bind(case, tensors)
        found = {"forward": extra_bytes(bound, "forward", device)}
        if implementation.backward:
            found["forward_backward"] = extra_bytes(bound, "forward_backward", device)
        yield found
