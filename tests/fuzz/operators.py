"""Random problems of every public function of mmdcn.ops, against torch's own grid_sample.

A problem is that of the suite's tests; what is drawn in addition is how its tensors lie in memory,
which dtypes they have beside each other, what is differentiated for, and by how many threads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from random import Random
from typing import ClassVar

import torch
from torch import Tensor

from mmdcn.ops import dcnv4
from tests.fuzz import oracle
from tests.fuzz.memory import VIEWS
from tests.fuzz.trials import InvalidTrial, Source
from tests.ops.aggregate_problems import AggregateProblem, draw_aggregate_problem
from tests.ops.calls import COORDINATES
from tests.ops.problems import (
    TOLERANCE,
    OperatorProblem,
    Problem,
    draw_problem,
    exact,
    largest_error,
    wide,
)
from tests.ops.roi_problems import RoIProblem, draw_roi_problem

THREADS = (1, 2, 3, 5)
#: Offsets that reach nothing; float16 has infinity for the last ones.
NOWHERE = (float("nan"), float("inf"), -float("inf"), 6e4, -6e4, 1e30, -3e38)


@dataclasses.dataclass
class PackedProblem(AggregateProblem):
    """Sizes of one call of DCNv4; `padded` with channels that are ignored."""

    padded: bool = False
    function = staticmethod(dcnv4)

    def tensors(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict:
        apart = AggregateProblem(
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(AggregateProblem)
                if f.init
            }
        )
        return apart.packed(dtype, self.padded)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One call of a public function, forward and backward.

    Attributes:
        problem: its sizes and values.
        dtype: that of the features.
        wide: the coordinates that are float32 beside features in half precision.
        views: how the tensors, and `grad_output`, lie in memory; contiguous where not said.
        wanted: the tensors that are differentiated for.
        nowhere: how many offsets are not finite, or huge.
        threads: those of the call, and those of another one, which must give the same bits.
    """

    problem: OperatorProblem
    dtype: torch.dtype = torch.float64
    wide: tuple[str, ...] = ()
    views: dict[str, str] = dataclasses.field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    nowhere: int = 0
    threads: tuple[int, int] = (1, 1)

    IMPORTS: ClassVar[str] = "from tests.fuzz.operators import *"

    @staticmethod
    def prepare() -> None:
        """Nothing is needed."""

    def tensors(self) -> dict[str, Tensor | None]:
        tensors = {}
        for name, values in self.problem.tensors(torch.float64).items():
            if values is not None:
                values = values.detach().clone(memory_format=torch.contiguous_format)
                if self.nowhere and name in ("offset", "offset_mask"):
                    self._move_away(name, values)
                features = name not in COORDINATES
                dtype = wide(self.dtype) if name in self.wide else self.dtype
                values = VIEWS[self.views.get(name, "contiguous")](
                    values.to(self.dtype if features else dtype)
                ).requires_grad_(name in self.wanted)
            tensors[name] = values
        return tensors

    def _move_away(self, name: str, offsets: Tensor) -> None:
        """Put some offsets where they reach nothing."""
        random = Random(self.problem.seed)
        flat, taps = offsets.view(-1), getattr(self.problem, "taps", 0)
        for _ in range(self.nowhere if len(flat) else 0):
            place = random.randrange(len(flat))
            if name == "offset_mask" and place % offsets.shape[-1] % (3 * taps) >= 2 * taps:
                continue  # a modulation
            flat[place] = random.choice(NOWHERE)

    def grad_output(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        values = torch.randn(self.problem.out_shape, generator=generator).to(self.dtype)
        return VIEWS[self.views.get("grad_output", "contiguous")](values)

    def results(self, function: Callable[..., Tensor], tensors: dict, grad: Tensor) -> dict:
        """Output and gradients by name."""
        with torch.set_grad_enabled(bool(self.wanted)):
            output = function(**tensors, **self.problem.arguments())
        wanted = [name for name in self.wanted if tensors[name] is not None]
        leaves = [tensors[name] for name in wanted]
        gradients = torch.autograd.grad(output, leaves, grad) if leaves else ()
        return {"output": output.detach(), **dict(zip(wanted, gradients))}

    def check(self) -> None:
        """Forward and backward against the oracle, and again with another number of threads."""
        torch.set_num_threads(1)
        try:
            tensors, grad = self.tensors(), self.grad_output()
            expected = self.results(ORACLES[type(self.problem)], exact(tensors), grad.double())
        except Exception as error:
            raise InvalidTrial(f"{type(error).__name__}: {error}") from error
        results = [
            self._by_threads(number, tensors, grad) for number in dict.fromkeys(self.threads)
        ]
        for name, value in expected.items():
            actual = results[0][name]
            dtype = self.dtype if name == "output" else tensors[name].dtype
            assert (actual.shape, actual.dtype) == (value.shape, dtype), f"{name}: {actual.dtype}"
            error = largest_error(actual, value)
            assert error <= TOLERANCE[self.dtype], f"{name}: error {error:.2e}"
            for again in results[1:]:
                assert torch.equal(again[name], actual), f"{name}: other bits for {self.threads}"

    def _by_threads(self, number: int, tensors: dict, grad: Tensor) -> dict:
        """The results by so many threads."""
        torch.set_num_threads(number)
        try:
            return self.results(self.problem.function, tensors, grad)
        finally:
            torch.set_num_threads(1)

    def simpler(self) -> Iterator["Trial"]:
        """Trials that are one step simpler, the simplest first."""
        change = dataclasses.replace
        if self.nowhere:
            yield change(self, nowhere=0)
        if self.threads != (1, 1):
            yield change(self, threads=(1, 1))
        if self.dtype != torch.float64:
            yield change(self, dtype=torch.float64, wide=())
        if self.wide:
            yield change(self, wide=())
        for name in self.views:
            yield change(self, views={n: v for n, v in self.views.items() if n != name})
        for name in self.wanted:
            yield change(self, wanted=tuple(n for n in self.wanted if n != name))
        for problem in simpler_problems(self.problem):
            yield change(self, problem=problem)


NAMES = {
    Problem: ("input", "offset", "weight", "bias", "mask"),
    AggregateProblem: ("input", "offset", "mask"),
    PackedProblem: ("input", "offset_mask"),
    RoIProblem: ("input", "rois", "offset"),
}
ORACLES = {
    Problem: oracle.deform_conv,
    AggregateProblem: oracle.dcnv3,
    PackedProblem: oracle.dcnv4,
    RoIProblem: oracle.deform_roi_pool,
}


def simpler_problems(problem: OperatorProblem) -> Iterator[OperatorProblem]:
    """Problems with one number smaller; some have no place for the kernel, or no such groups."""

    def smaller(value: int) -> list[int]:
        least = 0 if value < 2 else 1
        return list(dict.fromkeys(n for n in (least, value // 3, value // 2, value - 1) if n >= 0))

    for field in dataclasses.fields(problem):
        if not field.init or field.name == "dyadic":
            continue
        value, choices = getattr(problem, field.name), []
        if isinstance(value, bool):
            choices = [False]
        elif isinstance(value, int):
            choices = [0] if field.name == "seed" else smaller(value)
        elif isinstance(value, tuple):
            for i, number in enumerate(value):
                choices += [(*value[:i], n, *value[i + 1 :]) for n in smaller(number)]
        for choice in choices:
            if choice != value:
                yield dataclasses.replace(problem, **{field.name: choice})


# ------------------------------------------------------------------------------------------- draws


def draw_convolution(random: Random, rank: int) -> Problem:
    problem = draw_problem(random, (rank,))
    kind = random.random()
    if kind < 0.08:  # A kernel larger than its image.
        kernel, dilation = random.choice([5, 7, 9]), random.choice([1, 2])
        padding = dilation * (kernel - 1) // 2 + random.choice([0, 1])
        return dataclasses.replace(
            problem,
            kernel=(kernel, *[random.choice([1, 3])] * (rank - 1)),
            dilation=(dilation,) * rank,
            padding=(padding,) * rank,
            size=tuple(random.randint(1, 3) for _ in range(rank)),
        )
    if kind < 0.082 and rank == 2:  # Enough work for several threads.
        groups, deform_groups = random.choice([1, 2, 4]), random.choice([1, 2, 3, 6, 12])
        return dataclasses.replace(
            problem,
            channels=96,
            out_channels=random.choice([64, 132]),
            groups=groups,
            deform_groups=deform_groups,
            kernel=(3, random.choice([1, 3])),
            padding=(1, 1),
            dilation=(1, 1),
            size=(random.randint(9, 17), random.randint(30, 70)),
        )
    return problem


def draw_pooling(random: Random) -> RoIProblem:
    problem = draw_roi_problem(random, dyadic=random.random() < 0.8)
    return dataclasses.replace(problem, rois=0) if random.random() < 0.03 else problem


def draw_packed(random: Random) -> PackedProblem:
    fields = dataclasses.fields(AggregateProblem)
    drawn = draw_aggregate_problem(random)
    return PackedProblem(
        **{f.name: getattr(drawn, f.name) for f in fields if f.init},
        padded=random.choice([False, True]),
    )


DRAWS: dict[str, Callable[[Random], OperatorProblem]] = {
    "deform_conv2d": lambda random: draw_convolution(random, 2),
    "deform_conv1d": lambda random: draw_convolution(random, 1),
    "deform_conv3d": lambda random: draw_convolution(random, 3),
    "dcnv3": draw_aggregate_problem,
    "dcnv4": draw_packed,
    "deform_roi_pool": draw_pooling,
}


def draw(function: str, random: Random) -> Trial:
    """A trial of a public function of mmdcn.ops."""
    problem = DRAWS[function](random)
    if random.random() < 0.03 and not isinstance(problem, RoIProblem):
        problem = dataclasses.replace(problem, batch=0)
    dtype = random.choice(list(TOLERANCE))
    if getattr(problem, "dyadic", True) is False:
        # Coordinates that float32 does not have lie beside a kink, and gradients differ there.
        dtype = torch.float64
    names = NAMES[type(problem)]
    halves = [n for n in names if n in COORDINATES and dtype.itemsize == 2]
    views = {}
    for name in [*names, "grad_output"]:
        if random.random() < 0.4:
            view = random.choice(list(VIEWS))
            # A box with the numbers of another, or of two others, is another one; no image is -1.
            if name != "rois" or not view.startswith("expanded"):
                views[name] = view
    differentiable = [name for name in names if name != "rois"]
    wanted = differentiable
    if random.random() < 0.4:
        wanted = [name for name in differentiable if random.random() < 0.5]
    nowhere = random.choice([1, 3, 20]) if random.random() < 0.2 else 0
    if views.get("offset_mask") == "expanded columns":
        nowhere = 0  # These would be modulations too.
    return Trial(
        problem=problem,
        dtype=dtype,
        wide=tuple(n for n in halves if random.random() < 0.5),
        views=views,
        wanted=tuple(wanted),
        nowhere=nowhere,
        threads=(random.choice(THREADS), random.choice(THREADS)),
    )


def sources() -> list[Source]:
    """Ten times as many trials of deform_conv2d as of each other function."""
    return [
        Source(name, functools.partial(draw, name), weight=10 if name == "deform_conv2d" else 1)
        for name in DRAWS
    ]
