"""The operator against its peers: time, memory, and what the machine could do at best."""

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmdcn import timing
from mmdcn.errors import named_first_line
from mmdcn.machine import machine, versions
from mmdcn.ops import reference

from . import BenchmarkError, memory
from .cases import DTYPES, Case, make_tensors
from .implementations import (
    PEERS,
    Bound,
    Dense,
    Implementation,
    Mmdcn,
    MmdcnFloat32,
    MmdcnOneThread,
    OnnxRuntime,
    OpenVino,
)
from .progress import track

DIRECTIONS = ("forward", "forward_backward")

# Distance of two results, relative to their size (Euclidean norms), beyond which one is wrong.
# Rounding stays far below, a wrong result is far above.
TOLERANCE = {"float64": 1e-6, "float32": 1e-3, "float16": 3e-2, "bfloat16": 1e-1}


@dataclass
class Settings:
    """The settings of :func:`run`: what it measures, and for how long.

    All cases are gone through `passes` times, with a part of the budget each time: a disturbance of
    some seconds then reaches few of a call's samples, and its tensors lie elsewhere each time.
    """

    cases: list[Case]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: list[str] = field(default_factory=lambda: list(PEERS))
    directions: tuple[str, ...] = DIRECTIONS
    offset_std: float = 2.0
    threads: int | None = None
    scaling: bool = False
    measure_memory: bool = True
    budget: timing.Budget = field(default_factory=timing.Budget)
    passes: int = 1


def run(settings: Settings, result: dict) -> None:
    """Measure everything, and fill `result` with it, as it will be in JSON, step by step.

    Raises:
        BenchmarkError: an implementation gives a wrong result.
    """
    device = settings.device
    set_up(device, settings.threads)
    implementations, left_out = _choose(settings)
    result |= {
        "benchmark": "operators",
        "machine": machine(device),
        "versions": versions(),
        "settings": {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "offset_std": settings.offset_std,
            "seconds_per_call": settings.budget.seconds,
            "passes": settings.passes,
        },
        "implementations": [i.name for i in implementations],
        "left_out": left_out,
        "rates": {},
        "cases": [],
        "complete": False,
    }
    steps = [("rates of this machine", None)] + [
        (f"{case.label}, {case.version}, {case.layout}, {case.dtype}", index)
        for _ in range(settings.passes)
        for index, case in enumerate(settings.cases)
    ]
    checker = _Checker(settings)
    for index in track(steps):
        if index is None:
            result["rates"] = _rates(settings)
            continue
        first_pass = index == len(result["cases"])
        entry = None if first_pass else result["cases"][index]
        entry = _time_case(settings.cases[index], entry, implementations, settings, checker)
        if first_pass:
            result["cases"].append(entry)
    if settings.measure_memory and memory.can_measure(device):
        _measure_memory(result, implementations, settings)
    _raise_rates(result)
    for entry, case in zip(result["cases"], settings.cases):
        entry["floor_ms"] = {d: _floor(case, d, result["rates"]) for d in settings.directions}
    result["complete"] = True


def set_up(device: torch.device, threads: int | None) -> None:
    """Make torch compute what is measured as fairly as fast."""
    if threads is not None:
        torch.set_num_threads(threads)
    if device.type == "cuda":
        # Dense convolution runs at its best, and in the same arithmetic as ours.
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def _choose(settings: Settings) -> tuple[list[Implementation], dict[str, str]]:
    """The implementations that can be used here, and why the others cannot."""
    wanted: list[Implementation] = [Mmdcn()]
    if any(MmdcnFloat32().refuses(case) is None for case in settings.cases):
        wanted.append(MmdcnFloat32())
    if settings.scaling:
        wanted.append(MmdcnOneThread())
    for name in settings.peers:
        peer = PEERS[name]
        wanted.append(peer(settings.threads) if peer in (OnnxRuntime, OpenVino) else peer())
    left_out = {i.name: reason for i in wanted if (reason := i.missing(settings.device))}
    return [i for i in wanted if i.name not in left_out], left_out


# ------------------------------------------------------------------------------------------- times


def _time_case(
    case: Case,
    entry: dict | None,
    implementations: list[Implementation],
    settings: Settings,
    checker: "_Checker",
) -> dict:
    """Add one pass's samples of one case to its entry, which the first pass makes."""
    if entry is None:
        bound, entry = _bind_checked(case, implementations, settings, checker)
    else:
        tensors = make_tensors(case, settings.device, settings.offset_std)
        bound = {i: i.bind(case, tensors) for i in implementations if i.name not in entry["cannot"]}
    budget = settings.budget.part(settings.passes)
    for direction in settings.directions:
        calls = {
            i.name: timing.Call(b.infer if direction == "forward" else b.train, i.threads)
            for i, b in bound.items()
            if direction == "forward" or i.backward
        }
        times = entry["times"].setdefault(direction, {})
        for name, samples in timing.interleave(calls, settings.device, budget).items():
            times.setdefault(name, []).extend(samples)
    return entry


def _bind_checked(
    case: Case, implementations: list[Implementation], settings: Settings, checker: "_Checker"
) -> tuple[dict[Implementation, Bound], dict]:
    """Every implementation that can compute a case and computes it right, and the case's entry."""
    tensors = make_tensors(case, settings.device, settings.offset_std)
    bound: dict[Implementation, Bound] = {}
    entry = {**case.describe(), "times": {}, "cannot": {}}
    outputs = checker.expected_outputs(case, tensors)
    results: dict[str, dict[str, Tensor]] = {}
    for implementation in implementations:
        reason = implementation.refuses(case)
        if reason is None:
            try:
                bound[implementation] = implementation.bind(case, tensors)
                results[implementation.name] = _results(bound[implementation], settings)
            # Peers have exceptions of their own.
            except Exception as error:
                if isinstance(implementation, Mmdcn):
                    raise
                bound.pop(implementation, None)
                reason = named_first_line(error)
        if reason is not None:
            entry["cannot"][implementation.name] = reason
    for implementation in bound:
        if implementation.deformable:
            checker.check(case, implementation.name, results, outputs)
    if "mmdcn, 1 thread" in results:
        one, all_ = results["mmdcn, 1 thread"], results["mmdcn"]
        entry["same_on_one_thread"] = all(torch.equal(one[name], all_[name]) for name in all_)
    return bound, entry


def _results(bound: Bound, settings: Settings) -> dict[str, Tensor]:
    """The output, and the gradients where they will be timed."""
    if not bound.leaves or "forward_backward" not in settings.directions:
        return {"output": bound.infer()}
    output = bound.train().detach()
    return {"output": output, **{f"gradient of {n}": g for n, g in bound.gradients().items()}}


class _Checker:
    """Compares results before they are timed: the time of a wrong one means nothing.

    Outputs are compared with the equations in plain PyTorch, for the first and the last image;
    gradients with ours, which the tests compare with the same equations.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.key: Case | None = None
        self.outputs: list[Tensor] = []

    def expected_outputs(self, case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
        # Usually the same problem follows in another dtype or layout.
        key = replace(case, dtype="float32", layout="nchw")
        if key != self.key:
            self.key = key
            self.outputs = [
                reference.deform_conv2d(
                    tensors["input"][image].double(),
                    tensors["offset"][image].double(),
                    tensors["weight"].double(),
                    mask=tensors["mask"][image].double() if "mask" in tensors else None,
                    **case.arguments(),
                )
                for image in (slice(0, 1), slice(case.batch - 1, None))
            ]
        return self.outputs

    def check(
        self,
        case: Case,
        name: str,
        results: dict[str, dict[str, Tensor]],
        outputs: list[Tensor],
    ) -> None:
        ours, found = results["mmdcn"], results[name]
        compared = [
            ("output", found["output"][:1], outputs[0], "the reference's"),
            ("output", found["output"][-1:], outputs[1], "the reference's"),
        ]
        if name != "mmdcn":
            compared += [(key, found[key], ours[key], "ours") for key in found if key in ours]
        for what, value, expected, whose in compared:
            # `>` would not do, as the distance may be NaN.
            if not (apart := distance(value, expected)) <= TOLERANCE[case.dtype]:
                raise BenchmarkError(
                    f"{name} computes a wrong {what} for {case.label}, {case.version}, "
                    f"{case.layout}, {case.dtype}: expected {whose} within {TOLERANCE[case.dtype]} "
                    f"of its norm, got a distance of {apart:.2g}. Wrong results are not timed; "
                    f"leave {name} out by --peers, and report this."
                )


def distance(value: Tensor, expected: Tensor) -> float:
    """The distance of two results, relative to the size of what is expected."""
    value, expected = value.double(), expected.double()
    return float((value - expected).norm() / expected.norm().clamp(min=1e-30))


# ------------------------------------------------------------------------------------------ memory


def growth_cases(case: Case) -> list[Case]:
    """A case, four times its batch, and twice its height and width: what memory grows with."""
    return [
        case,
        replace(case, name="batch × 4", batch=4 * case.batch),
        replace(case, name="image × 4", height=2 * case.height, width=2 * case.width),
    ]


def _measure_memory(
    result: dict, implementations: list[Implementation], settings: Settings
) -> None:
    """Add to each case the bytes that each implementation takes, and how these grow."""
    growth = growth_cases(settings.cases[0])[1:]
    result["memory_growth"] = [case.describe() for case in growth]
    entries = result["cases"] + result["memory_growth"]
    for entry in entries:
        entry["extra_bytes"] = {direction: {} for direction in settings.directions}
    compared = [i for i in implementations if type(i) not in (MmdcnFloat32, MmdcnOneThread)]
    for implementation in track((f"memory of {i.name}", i) for i in compared):
        fit = [
            (entry, case)
            for entry, case in zip(entries, [*settings.cases, *growth])
            if implementation.refuses(case) is None
            and implementation.name not in entry.get("cannot", {})
        ]
        answers = _extra_bytes(implementation, [case for _, case in fit], settings)
        for (entry, _), answer in zip(fit, answers):
            for direction in settings.directions:
                if direction in answer:
                    entry["extra_bytes"][direction][implementation.name] = answer[direction]
            if "cannot" in answer:
                entry.setdefault("memory_cannot", {})[implementation.name] = answer["cannot"]


def _extra_bytes(
    implementation: Implementation, cases: list[Case], settings: Settings
) -> list[dict[str, int | str]]:
    if settings.device.type != "cuda":
        return memory.measure_on_cpu(
            implementation.name, cases, settings.offset_std, torch.get_num_threads()
        )
    answers = []
    for case in cases:
        bound = implementation.bind(case, make_tensors(case, settings.device, settings.offset_std))
        answers.append(
            {
                direction: memory.extra_bytes(bound, direction, settings.device)
                for direction in settings.directions
                if direction == "forward" or implementation.backward
            }
        )
    return answers


# ------------------------------------------------------------------------------------------ floors

_MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


def _rates(settings: Settings) -> dict:
    """What this machine multiplies and moves at best, measured in the same run."""
    device = settings.device
    size = _MATRIX_SIZE[device.type]
    elements = _COPY_BYTES[device.type] // 4
    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    calls = {
        "copy": timing.Call(lambda: target.copy_(source)),
        "read": timing.Call(lambda: source.sum()),
    }
    dtypes = list(dict.fromkeys(case.dtype for case in settings.cases))
    products = {}  # the dtype of each, and its operations
    # What is stored in half precision may be multiplied in float32, where that is faster.
    for dtype in dict.fromkeys([*dtypes, "float32"]):
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        name = f"a matrix product of {size} × {size} in {dtype}"
        calls[name] = timing.Call(lambda a=a, b=b: a @ b)
        products[name] = (dtype, 2 * size**3)
    # On some processors a convolution multiplies faster than that.
    largest = replace(max(settings.cases, key=lambda case: case.flops), dtype="float32")
    dense = Dense().bind(largest, make_tensors(largest, device, settings.offset_std))
    name = f"the dense convolution of {largest.label}, {largest.layout}, in float32"
    calls[name] = timing.Call(dense.infer)
    products[name] = ("float32", largest.flops)
    samples = timing.interleave(calls, device, settings.budget)
    copied, read = (timing.median(samples[name]) for name in ("copy", "read"))
    rates = {
        "samples_ms": samples,
        "matrix_size": size,
        "bytes": 4 * elements,
        "copy_gb_per_s": 2 * 4 * elements / copied / 1e6,
        "read_gb_per_s": 4 * elements / read / 1e6,
        "gflop_per_s": {},
        "gflop_per_s_from": {},
    }
    for dtype in dtypes:
        usable = ("float32", dtype) if DTYPES[dtype] < 4 else (dtype,)
        gflop_per_s = {
            name: flops / timing.median(samples[name]) / 1e6
            for name, (product_dtype, flops) in products.items()
            if product_dtype in usable
        }
        best = max(gflop_per_s, key=gflop_per_s.get)
        rates["gflop_per_s"][dtype] = gflop_per_s[best]
        rates["gflop_per_s_from"][dtype] = best
    return rates


def _raise_rates(result: dict) -> None:
    """Where a dense convolution multiplied faster than the matrix product, take its rate."""
    rates = result["rates"]
    passes = {"forward": 1, "forward_backward": 3}
    for entry, direction in itertools.product(result["cases"], passes):
        samples = entry["times"].get(direction, {}).get("dense")
        if not samples:
            continue
        rate = passes[direction] * entry["flops"] / timing.median(samples) / 1e6
        if rate > rates["gflop_per_s"][entry["dtype"]]:
            rates["gflop_per_s"][entry["dtype"]] = rate
            where = f"{entry['label']}, {entry['layout']}, {direction.replace('_', ' + ')}"
            rates["gflop_per_s_from"][entry["dtype"]] = f"the dense convolution of {where}"


def _floor(case: Case, direction: str, rates: dict) -> dict[str, float]:
    """Milliseconds that multiplying and moving take at this machine's best rates."""
    flops = case.flops * (1 if direction == "forward" else 3)
    bandwidth = max(rates["copy_gb_per_s"], rates["read_gb_per_s"])
    return {
        "multiply": flops / rates["gflop_per_s"][case.dtype] / 1e6,
        "move": case.bytes_moved(direction) / bandwidth / 1e6,
    }
