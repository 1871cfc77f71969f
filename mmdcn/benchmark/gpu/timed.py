"""The convolution beside its peers, whole and pass by pass, compared before it is timed."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mmdcn import timing
from mmdcn.errors import named_first_line

from .. import cases, memory
from ..implementations import Bound, Dense, Equation, Implementation, Mmdcn, Torchvision
from ..operators import DIRECTIONS, distance
from . import profiling
from .calls import deterministic, float32_in
from .sections import Case, Wrong
from .settings import Settings

#: What is timed: dtypes, and float32 multiplied in TF32.
ARITHMETICS = ("float16", "float32", "tf32", "bfloat16")

# Distance of two results, relative to the size of what is right (Euclidean norms), beyond which one
# is wrong: some roundings of every element.
DISTANCE = {"float32": 5e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1.6e-2}

# Gradients that the backward operator gives at a time: of input, offset, weight and mask.
_PASSES = {
    "backward": (True, True, True, True),
    "backward to input": (True, False, False, False),
    "backward to offset and mask": (False, True, False, True),
    "backward to input, offset and mask": (True, True, False, True),
    "backward to weight": (False, False, True, False),
}


class Checked:
    """A case's tensors on a device, and ours bound to them, whose results are right.

    Attributes:
        case, arithmetic: what is computed, and how.
        tensors: in float32, rounded to the case's dtype.
        ours: computes them.
        distances: of the results from what is expected, by name.
        expected_from: what that is computed by.

    Raises:
        Wrong: ours gives a wrong result.
    """

    def __init__(
        self, settings: Settings, case: cases.Case, arithmetic: str, offset_std: float = 2.0
    ) -> None:
        self.device = settings.target
        self.arithmetic = arithmetic
        self.case = replace(case, dtype="float32" if arithmetic == "tf32" else arithmetic)
        dtype = getattr(torch, self.case.dtype)
        made = cases.make_tensors(self.case, self.device, offset_std)
        coordinates = ("offset", "mask")
        self.tensors = {n: t if n in coordinates else t.to(dtype).float() for n, t in made.items()}
        self.ours = Mmdcn().bind(self.case, self.tensors)
        self.expected_from, self.expected = self._expected()
        self.distances = self.check(results_of(self.ours))

    def _expected(self) -> tuple[str, dict[str, Tensor]]:
        """Output and gradients in float32 on the same tensors, by somebody else."""
        exact = replace(self.case, dtype="float32", layout="nchw")
        peer, tensors = Torchvision(), self.tensors
        if peer.missing(self.device) is not None:
            peer = Equation()
            if self.device.type == "cuda":  # where the equation would take all of the memory
                peer, tensors = Mmdcn(), {name: t.cpu() for name, t in tensors.items()}
        with float32_in("float32"):
            found = results_of(peer.bind(exact, tensors))
        if isinstance(peer, Torchvision) and not tensors["offset"].any():
            # At whole coordinates a sample may lie exactly one pixel outside, where torchvision's
            # operator gives the offset no gradient.
            del found["grad_offset"]
        where = " on the CPU" if isinstance(peer, Mmdcn) else ""
        return f"{peer.name}{where}", {name: t.to(self.device) for name, t in found.items()}

    def check(self, results: dict[str, Tensor]) -> dict[str, float]:
        distances = {n: distance(results[n], t) for n, t in self.expected.items()}
        bound = DISTANCE[self.arithmetic]
        # `>` would not do, as the distance may be NaN.
        wrong = [f"{n}: distance {d:.1e}" for n, d in distances.items() if not d <= bound]
        if wrong:
            found = {"distances": distances, "bound": bound, "expected_from": self.expected_from}
            raise Wrong(wrong, found)
        return distances

    def describe(self) -> dict:
        return {
            "stage": self.case.name,
            "batch": self.case.batch,
            "arithmetic": self.arithmetic,
            "layout": self.case.layout,
            "expected_from": self.expected_from,
            "distances": self.distances,
        }


def results_of(bound: Bound) -> dict[str, Tensor]:
    output = bound.train().detach()
    results = {"output": output, **{f"grad_{n}": g for n, g in bound.gradients().items()}}
    bound.drop_gradients()
    return results


def at_its_best(function: Callable[..., dict]) -> Callable[..., dict]:
    """Let cuDNN choose the algorithms of dense convolutions by timing them, during the call."""

    @functools.wraps(function)
    def call(*arguments):
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True
        try:
            return function(*arguments)
        finally:
            torch.backends.cudnn.benchmark = before

    return call


# ------------------------------------------------------------------------------------------- rows


def rows(settings: Settings) -> list[Case]:
    """Forward, and forward and backward, of every shape, batch, arithmetic and layout."""
    layouts = ("nchw", "channels_last")
    return [
        Case(
            f"{shape.name}, batch {batch}, {arithmetic}, {layout}",
            functools.partial(
                _row, settings, replace(shape, batch=batch, layout=layout), arithmetic
            ),
        )
        for batch in settings.batches
        for arithmetic in ARITHMETICS
        for layout in layouts
        for shape in settings.shapes
    ]


@at_its_best
def _row(settings: Settings, case: cases.Case, arithmetic: str) -> dict:
    with float32_in(arithmetic):
        checked = Checked(settings, case, arithmetic)
        row = checked.describe() | {"milliseconds": {}, "extra_mb": {}, "left_out": {}}
        checked.expected = {}  # it takes memory
        row["kernels"] = kernels_of(checked.ours, settings)
        calls = _calls(checked, row)
        for direction in DIRECTIONS:
            row["extra_mb"][direction] = {
                name: memory.extra_bytes(bound, direction, settings.target) / 1e6
                for name, bound in calls.items()
                if "," not in name and settings.device == "cuda"
            }
            samples = timing.interleave(_timed(calls, direction), settings.target, settings.budget)
            row["milliseconds"][direction] = {n: timing.median(t) for n, t in samples.items()}
    return row


def _calls(checked: Checked, row: dict) -> dict[str, Bound]:
    """What is timed beside each other."""
    case, tensors = checked.case, checked.tensors
    still = {**tensors, "offset": torch.zeros_like(tensors["offset"])}
    calls = {"mmdcn": checked.ours, "mmdcn, no offsets": Mmdcn().bind(case, still)}
    peers: list[Implementation] = [Dense(), Torchvision()]
    for peer in peers:
        problem = peer.missing(checked.device)
        if problem is None:
            try:
                bound = peer.bind(case, tensors)
                results_of(bound)
                calls[peer.name] = bound
            # Peers have exceptions of their own.
            except Exception as error:
                problem = named_first_line(error)
        if problem is not None:
            row["left_out"][peer.name] = problem
    return calls


def _timed(calls: dict[str, Bound], direction: str) -> dict[str, timing.Call]:
    if direction == "forward":
        return {name: timing.Call(bound.infer) for name, bound in calls.items()}
    timed = {name: timing.Call(bound.train) for name, bound in calls.items()}
    train = calls["mmdcn"].train

    def in_order() -> None:
        with deterministic():
            train()

    return timed | {"mmdcn, deterministic": timing.Call(in_order)}


def kernels_of(ours: Bound, settings: Settings) -> dict[str, dict[str, float]]:
    """The kernels of a call of ours, and their microseconds, by direction.

    Raises:
        Wrong: they are not ours.
    """
    found = {}
    for direction, step, parts in (
        ("forward", ours.infer, ("gather_kernel",)),
        ("forward_backward", ours.train, ("gather_kernel", "scatter_kernel")),
    ):
        found[direction] = profiling.kernels(step, settings.target)
        problem = profiling.problem(found[direction], settings.target, parts)
        if problem is not None:
            raise Wrong([problem], {"kernels": found})
    ours.drop_gradients()
    return found


# ----------------------------------------------------------------------------------------- passes


def passes(settings: Settings) -> list[Case]:
    """Each pass by itself, with the kernels that it consists of."""
    return [
        Case(
            f"{shape.name}, batch 2, {arithmetic}",
            functools.partial(_passes, settings, replace(shape, batch=2), arithmetic),
        )
        for arithmetic in ARITHMETICS
        for shape in settings.shapes
    ]


def passes_of(checked: Checked) -> dict[str, Callable[[], object]]:
    """The forward pass, and backward passes by the gradients that are asked for."""
    case = checked.case
    geometry = [[number] * 2 for number in case.arguments().values()]
    x, offset, weight, mask = (leaf.detach() for leaf in checked.ours.leaves.values())
    grad_output = checked.ours.grad_output

    def backward(wanted: tuple[bool, ...]) -> Callable[[], object]:
        arguments = (grad_output, x, offset, weight, *geometry, mask, list(wanted))
        return lambda: torch.ops.mmdcn.deform_conv2d_backward(*arguments)

    arguments = (x, offset, weight, None, *geometry, mask)
    return {
        "forward": lambda: torch.ops.mmdcn.deform_conv2d(*arguments),
        **{name: backward(wanted) for name, wanted in _PASSES.items()},
    }


def _dense_passes(checked: Checked) -> dict[str, Callable[[], object]]:
    dense = Dense().bind(checked.case, checked.tensors)
    x, weight = (leaf.detach() for leaf in dense.leaves.values())
    geometry = [[number] * 2 for number in checked.case.arguments().values()]

    def backward(*wanted: bool) -> Callable[[], object]:
        return lambda: torch.ops.aten.convolution_backward(
            *(dense.grad_output, x, weight, None, *geometry, False, [0, 0], 1, [*wanted, False])
        )

    return {
        "dense: forward": lambda: torch.ops.aten.convolution(
            x, weight, None, *geometry, False, [0, 0], 1
        ),
        "dense: backward to input": backward(True, False),
        "dense: backward to weight": backward(False, True),
    }


@at_its_best
def _passes(settings: Settings, case: cases.Case, arithmetic: str) -> dict:
    with float32_in(arithmetic), torch.no_grad():
        with torch.enable_grad():
            checked = Checked(settings, case, arithmetic)
        calls = passes_of(checked)
        names = ("grad_input", "grad_offset", "grad_weight", "grad_mask")
        found = dict(zip(names, calls["backward"](), strict=True))
        checked.check({"output": calls["forward"](), **found})
        kernels = {name: profiling.kernels(call, settings.target) for name, call in calls.items()}
        with profiling.counted(settings.target):
            for call in calls.values():
                call()
        timed = {n: timing.Call(c) for n, c in (calls | _dense_passes(checked)).items()}
        samples = timing.interleave(timed, settings.target, settings.budget)
        milliseconds = {name: timing.median(taken) for name, taken in samples.items()}
    return checked.describe() | {"milliseconds": milliseconds, "kernels": kernels}
