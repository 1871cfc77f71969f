"""What the time depends on: offsets, chunks, who multiplies; and the other operators' times."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from mmdcn import timing
from mmdcn.errors import named_first_line
from mmdcn.ops._products import CALLS

from .. import BenchmarkError, cases, family
from ..operators import DIRECTIONS, distance
from . import profiling
from .calls import float32_in
from .sections import Case, NotRun, Wrong
from .settings import Settings
from .smoke import in_chunks_of, product_by, product_in_force
from .timed import DISTANCE, Checked, passes_of, results_of

# The pass in which a product is computed, and little else.
_PASS_OF = {
    "output": "forward",
    "grad_columns": "backward to input",
    "grad_weight": "backward to weight",
}
_OFFSET_STDS = (0.0, 0.5, 2.0, 8.0)
# MiB of columns at a time; 0: what follows from the device's cache.
_CHUNKS = (0, 8, 16, 32, 48, 96, 192)


def products(settings: Settings) -> list[Case]:
    """Each of torch's operators that could compute a product, in turns."""
    return [
        Case(
            f"{product}, {arithmetic}, {shape.name}",
            functools.partial(_product, settings, replace(shape, batch=2), product, arithmetic),
        )
        for shape in settings.shapes
        for product, arithmetics in CALLS.items()
        for arithmetic in arithmetics
        if arithmetic in DISTANCE
    ]


def _product(settings: Settings, case: cases.Case, product: str, arithmetic: str) -> dict:
    with float32_in(arithmetic):
        checked = Checked(settings, case, arithmetic)
        with torch.no_grad():
            run = passes_of(checked)[_PASS_OF[product]]
            timed, wrong = {}, {}
            for call in CALLS[product][arithmetic]:
                with product_by(settings, product, arithmetic, call):
                    try:
                        with torch.enable_grad():
                            checked.check(results_of(checked.ours))
                    except (Wrong, RuntimeError) as error:
                        wrong[call] = named_first_line(error)
                        continue
                timed[call] = timing.Call(_by(settings, product, arithmetic, call, run))
            samples = timing.interleave(timed, settings.target, settings.budget)
    found = {call: timing.median(taken) for call, taken in samples.items()}
    chosen = product_in_force(settings, product, arithmetic)
    return {
        **{"product": product, "arithmetic": arithmetic, "stage": case.name, "chosen": chosen},
        **{"milliseconds": found, "wrong": wrong},
    }


def _by(
    settings: Settings, product: str, arithmetic: str, call: str, run: Callable[[], object]
) -> Callable[[], object]:
    def timed() -> object:
        with product_by(settings, product, arithmetic, call):
            return run()

    return timed


def offsets(settings: Settings) -> list[Case]:
    """The spread of the offsets, which decides what the caches hold."""
    return [
        Case(
            f"{shape.name}, {arithmetic}, σ = {std:g}",
            functools.partial(_offsets, settings, replace(shape, batch=2), arithmetic, std),
        )
        for shape in settings.shapes
        for arithmetic in ("float16", "float32")
        for std in _OFFSET_STDS
    ]


def _offsets(settings: Settings, case: cases.Case, arithmetic: str, std: float) -> dict:
    with float32_in(arithmetic):
        checked = Checked(settings, case, arithmetic, std)
        checked.expected = {}
        calls = {
            "forward": timing.Call(checked.ours.infer),
            "forward_backward": timing.Call(checked.ours.train),
        }
        samples = timing.interleave(calls, settings.target, settings.budget)
    found = {name: timing.median(taken) for name, taken in samples.items()}
    return checked.describe() | {"offset_std": std, "milliseconds": found}


def chunks(settings: Settings) -> list[Case]:
    """How many columns are in memory at a time: few stay in the cache, many fill the device."""
    return [
        Case(
            f"{shape.name}, {arithmetic}",
            functools.partial(_chunks, settings, replace(shape, batch=8), arithmetic),
        )
        for shape in settings.shapes
        for arithmetic in ("float16", "float32")
    ]


def _chunks(settings: Settings, case: cases.Case, arithmetic: str) -> dict:
    def in_chunks(size: int, step: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            with in_chunks_of(settings, size << 20):
                return step()

        return call

    found = {}
    with float32_in(arithmetic):
        checked = Checked(settings, case, arithmetic)
        checked.expected = {}
        steps = {"forward": checked.ours.infer, "forward_backward": checked.ours.train}
        for direction, step in steps.items():
            timed = {f"{size}": timing.Call(in_chunks(size, step)) for size in _CHUNKS}
            samples = timing.interleave(timed, settings.target, settings.budget)
            found[direction] = {size: timing.median(taken) for size, taken in samples.items()}
    return checked.describe() | {"milliseconds": found}


# ---------------------------------------------------------------------------- the other operators


def other_operators(settings: Settings) -> list[Case]:
    """What :mod:`mmdcn.benchmark.family` measures, and ours in float16 besides."""
    problems = family.small_problems() if settings.tiny else family.PROBLEMS
    return [
        Case(f"{problem.operator}, {problem.label}", functools.partial(_other, settings, problem))
        for problem in problems
    ]


def _other(settings: Settings, problem: family.Problem) -> dict:
    with float32_in("float32"):
        try:
            calls = problem.bind(settings.target, 2.0)
        except BenchmarkError as error:
            raise NotRun(str(error)) from error
        try:
            family.check(problem, calls)
        except BenchmarkError as error:
            raise Wrong([str(error)], {}) from error
        ours = calls[family.OURS]
        calls["mmdcn, float16"] = half = family.in_dtype(ours, torch.float16)
        rounded = family.in_dtype(ours, torch.float16, torch.float32)
        expected = results_of(rounded)
        distances = {n: distance(t, expected[n]) for n, t in results_of(half).items()}
        wrong = [f"{n}: {d:.1e}" for n, d in distances.items() if not d <= DISTANCE["float16"]]
        if wrong:
            raise Wrong(wrong, {"distances": distances})
        kernels = profiling.kernels(ours.train, settings.target)
        if (strange := profiling.problem(kernels, settings.target)) is not None:
            raise Wrong([strange], {"kernels": kernels})
        limits = family.Settings(device=settings.target, budget=settings.budget)
        times = family.time_calls(problem, calls, limits)["times"]
    milliseconds = {
        direction: {name: timing.median(taken) for name, taken in times[direction].items()}
        for direction in DIRECTIONS
    }
    return {
        **{"operator": problem.operator, "problem": problem.label, "yardstick": problem.yardstick},
        **{"milliseconds": milliseconds, "kernels": kernels, "float16_distances": distances},
    }
