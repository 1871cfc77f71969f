"""The other operators: over one and three dimensions, of DCNv3 and DCNv4, and RoI pooling.

Each has a yardstick: what it replaces, where torch or mmcv computes that on any device, or else its
equation in plain PyTorch.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcn import timing
from mmdcn.errors import named_first_line
from mmdcn.machine import machine, versions
from mmdcn.ops import dcnv3, dcnv4, deform_conv1d, deform_conv3d, deform_roi_pool, reference

from . import BenchmarkError, memory
from .cases import OTHER_OPERATORS
from .implementations import Bound
from .operators import DIRECTIONS, TOLERANCE, distance, set_up
from .progress import track

OURS = "mmdcn"


@dataclass(frozen=True)
class Problem:
    """One call of an operator.

    Attributes:
        operator: its name in :mod:`mmdcn.ops`.
        label: its sizes in words.
        yardstick: the name of what ours is compared with.
        bind: makes, for a device and a standard deviation of the offsets, the calls by name: ours,
            the yardstick's, and others that are timed beside them.
        same: names of calls that must give the same result.
    """

    operator: str
    label: str
    yardstick: str
    bind: Callable[[torch.device, float], dict[str, Bound]]
    same: tuple[str, str]


def _bound(function: Callable[..., Tensor], *leaves: Tensor) -> Bound:
    named = {str(number): leaf for number, leaf in enumerate(leaves)}
    grad_output = torch.ones_like(function(*(leaf.detach() for leaf in leaves)))
    return Bound(lambda: function(*leaves), named, grad_output, function)


def in_dtype(bound: Bound, *dtypes: torch.dtype) -> Bound:
    """The same call on copies of its tensors, rounded to each of the dtypes in turn."""
    leaves = [leaf.detach() for leaf in bound.leaves.values()]
    for dtype in dtypes:
        leaves = [leaf.to(dtype) for leaf in leaves]
    return _bound(bound.function, *(leaf.requires_grad_() for leaf in leaves))


def _random(device: torch.device) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device)


# --------------------------------------------------------------------------------------- problems


def _convolution(
    batch: int, channels: int, size: tuple[int, ...], device: torch.device, offset_std: float
) -> dict[str, Bound]:
    """Kernels of 3 along each dimension, modulated."""
    rank, taps = len(size), 3 ** len(size)
    normal = _random(device)
    x, weight = normal(batch, channels, *size), normal(channels, channels, *[3] * rank)
    offset = offset_std * normal(batch, rank * taps, *size)
    mask = normal(batch, taps, *size).sigmoid()
    leaves = [t.requires_grad_() for t in (x, offset, weight, mask)]
    ours, dense = {1: (deform_conv1d, F.conv1d), 3: (deform_conv3d, F.conv3d)}[rank]
    ones = (1,) * rank

    def by_equation(x, offset, weight, mask):
        return reference.deform_conv_nd(x, offset, weight, None, ones, ones, ones, mask)

    return {
        OURS: _bound(lambda x, o, w, m: ours(x, o, w, padding=1, mask=m), *leaves),
        "dense": _bound(lambda x, w: dense(x, w, padding=1), x, weight),
        "plain PyTorch": _bound(by_equation, *leaves),
    }


def _aggregation(
    version: int, groups: int, channels: int, size: int, device: torch.device, offset_std: float
) -> dict[str, Bound]:
    """One image, 3×3; `channels` of each group."""
    normal = _random(device)
    x = normal(1, size, size, groups * channels)
    offset = offset_std * normal(1, size, size, groups, 18)
    mask = normal(1, size, size, groups, 9).softmax(-1)
    arguments = {"kernel_size": 3, "padding": 1, "group": groups}
    if version == 3:
        leaves, ours, equation = [x, offset.flatten(3), mask.flatten(3)], dcnv3, reference.dcnv3
    else:
        offset_mask = torch.cat([offset, mask], dim=-1).flatten(3)
        padding = -offset_mask.shape[3] % 8
        leaves, ours, equation = [x, F.pad(offset_mask, (0, padding))], dcnv4, reference.dcnv4
    leaves = [t.requires_grad_() for t in leaves]
    pairs = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return {
        OURS: _bound(lambda *t: ours(*t, **arguments), *leaves),
        "plain PyTorch": _bound(lambda *t: equation(*t, **pairs, group=groups), *leaves),
    }


def _roi_pooling(
    rois: int,
    channels: int,
    size: tuple[int, int],
    sampling_ratio: int,
    device: torch.device,
    offset_std: float,
) -> dict[str, Bound]:
    """7×7 bins of boxes of 4 to 24 pixels of the features, on two images."""
    roi_align = _roi_align()
    normal = _random(device)
    generator = torch.Generator().manual_seed(1)
    x, offset = normal(2, channels, *size), offset_std / 20 * normal(rois, 2, 7, 7)
    start, length = (torch.rand(rois, 2, generator=generator) for _ in range(2))
    start = start * torch.tensor([size[1] - 8.0, size[0] - 8.0])
    image = torch.arange(rois)[:, None] % 2
    boxes = torch.cat([image, start, start + 4 + 20 * length], dim=1).to(device)
    leaves = [t.requires_grad_() for t in (x, offset)]
    return {
        OURS: _bound(lambda x, o: deform_roi_pool(x, boxes, o, 7, 1.0, sampling_ratio), *leaves),
        "mmdcn, no offsets": _bound(
            lambda x: deform_roi_pool(x, boxes, None, 7, 1.0, sampling_ratio), x
        ),
        "RoI Align": _bound(lambda x: roi_align(x, boxes, sampling_ratio), x),
    }


def _roi_align() -> Callable[[Tensor, Tensor, int], Tensor]:
    """RoI Align of features, boxes and a sampling ratio: mmcv's, or else torchvision's."""
    problems = []
    for module, options in (("mmcv.ops", ("avg", True)), ("torchvision.ops", (True,))):
        try:
            function = importlib.import_module(module).roi_align
        # A broken installation may raise anything.
        except Exception as error:
            problems.append(named_first_line(error))
            continue
        return lambda x, boxes, ratio: function(x, boxes, (7, 7), 1.0, ratio, *options)
    raise BenchmarkError(f"RoI Align needs mmcv or torchvision: {'; '.join(problems)}")


def _problems() -> Iterator[Problem]:
    for operator, batch, channels, size in (
        ("deform_conv1d", 8, 128, (1000,)),
        ("deform_conv1d", 1, 256, (4000,)),
        ("deform_conv3d", 1, 64, (8, 28, 28)),
        ("deform_conv3d", 1, 128, (4, 14, 14)),
        ("deform_conv3d", 2, 32, (8, 16, 16)),
    ):
        label = f"{batch}, {channels}→{channels}, {'×'.join(map(str, size))}"
        bind = functools.partial(_convolution, batch, channels, size)
        yield Problem(operator, label, "dense", bind, (OURS, "plain PyTorch"))
    for version in (3, 4):
        for groups, channels, size in ((4, 16, 56), (16, 16, 56), (32, 16, 28)):
            label = f"1, {groups} groups of {channels}, {size}×{size}"
            bind = functools.partial(_aggregation, version, groups, channels, size)
            same = (OURS, "plain PyTorch")
            yield Problem(f"dcnv{version}", label, "plain PyTorch", bind, same)
    for ratio in (2, 0):
        label = f"512 RoIs, 256, 50×68, {'adaptive' if ratio == 0 else f'{ratio}×{ratio} points'}"
        bind = functools.partial(_roi_pooling, 512, 256, (50, 68), ratio)
        yield Problem(
            "deform_roi_pool", label, "RoI Align", bind, ("mmdcn, no offsets", "RoI Align")
        )


PROBLEMS = list(_problems())
OPERATORS = list(OTHER_OPERATORS)


def small_problems() -> list[Problem]:
    """One of each operator in a tiny size, to go through everything quickly."""
    small = {
        "deform_conv1d": functools.partial(_convolution, 2, 4, (9,)),
        "deform_conv3d": functools.partial(_convolution, 1, 4, (3, 4, 5)),
        "dcnv3": functools.partial(_aggregation, 3, 2, 4, 6),
        "dcnv4": functools.partial(_aggregation, 4, 2, 4, 6),
        "deform_roi_pool": functools.partial(_roi_pooling, 4, 3, (16, 20), 2),
    }
    return [
        replace(problem, label="small", bind=small[problem.operator])
        for problem in {problem.operator: problem for problem in PROBLEMS}.values()
    ]


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Settings:
    """The settings of :func:`run`: what it measures, and for how long."""

    operators: list[str] = field(default_factory=lambda: list(OPERATORS))
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offset_std: float = 2.0
    threads: int | None = None
    measure_memory: bool = True
    budget: timing.Budget = field(default_factory=timing.Budget)


def run(settings: Settings, result: dict) -> None:
    """Measure everything, and fill `result` with it, as it will be in JSON, step by step.

    Raises:
        BenchmarkError: ours gives another result than the equation in plain PyTorch.
    """
    set_up(settings.device, settings.threads)
    result |= {
        "benchmark": "family",
        "machine": machine(settings.device),
        "versions": versions(),
        "settings": {
            "device": settings.device.type,
            "threads": torch.get_num_threads(),
            "offset_std": settings.offset_std,
            "seconds_per_call": settings.budget.seconds,
        },
        "left_out": {},
        "cases": [],
        "complete": False,
    }
    chosen = [problem for problem in PROBLEMS if problem.operator in settings.operators]
    measured = []
    for problem in track((f"{problem.operator}, {problem.label}", problem) for problem in chosen):
        try:
            calls = problem.bind(settings.device, settings.offset_std)
        except BenchmarkError as error:
            result["left_out"][problem.operator] = str(error)
            continue
        check(problem, calls)
        result["cases"].append(time_calls(problem, calls, settings))
        measured.append(problem)
    if settings.measure_memory and memory.can_measure(settings.device):
        _add_memory(result["cases"], measured, settings)
    result["complete"] = True


def check(problem: Problem, calls: dict[str, Bound]) -> None:
    """Refuse wrong results, whose time means nothing."""
    ours, other = (calls[name] for name in problem.same)
    found, expected = ([b.train().detach(), *b.gradients().values()] for b in (ours, other))
    for value, right in zip(found, expected, strict=True):
        # `>` would not do, as the distance may be NaN.
        if not (apart := distance(value, right)) <= TOLERANCE["float32"]:
            raise BenchmarkError(
                f"{problem.operator} computes another result than {problem.same[1]} for "
                f"{problem.label}: expected it within {TOLERANCE['float32']} of its norm, got a "
                f"distance of {apart:.2g}"
            )


def time_calls(problem: Problem, calls: dict[str, Bound], settings: Settings) -> dict:
    entry = {"operator": problem.operator, "label": problem.label, "yardstick": problem.yardstick}
    entry["times"] = {}
    for direction in DIRECTIONS:
        timed = {
            name: timing.Call(bound.infer if direction == "forward" else bound.train)
            for name, bound in calls.items()
        }
        entry["times"][direction] = timing.interleave(timed, settings.device, settings.budget)
    return entry


def _add_memory(entries: list[dict], problems: list[Problem], settings: Settings) -> None:
    """Add the bytes that ours and the yardstick take beyond what goes in and comes out."""
    for entry in entries:
        entry["extra_bytes"] = {direction: {} for direction in DIRECTIONS}
    for ours in track([("memory of mmdcn", True), ("memory of the yardsticks", False)]):
        names = [OURS if ours else problem.yardstick for problem in problems]
        for entry, name, found in zip(entries, names, _extra_bytes(problems, names, settings)):
            for direction in DIRECTIONS:
                if direction in found:
                    entry["extra_bytes"][direction][name] = found[direction]


def _extra_bytes(problems: list[Problem], names: list[str], settings: Settings) -> list[dict]:
    if settings.device.type == "cuda":
        device, std = settings.device, settings.offset_std
        return [_extra_bytes_of(p.bind(device, std)[n], device) for p, n in zip(problems, names)]
    order = {
        "problems": [PROBLEMS.index(problem) for problem in problems],
        "names": names,
        "offset_std": settings.offset_std,
        "threads": torch.get_num_threads(),
    }
    return memory.measure_apart(__name__, order)


def _extra_bytes_of(bound: Bound, device: torch.device) -> dict[str, int]:
    return {direction: memory.extra_bytes(bound, direction, device) for direction in DIRECTIONS}


def measure(order: dict) -> Iterator[dict[str, int]]:
    """The answers to an order of :func:`memory.measure_apart`."""
    device = torch.device("cpu")
    for number, name in zip(order["problems"], order["names"]):
        yield _extra_bytes_of(PROBLEMS[number].bind(device, order["offset_std"])[name], device)
