"""Every kernel variant once, and drawn problems: are the results right?"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from mmdcn.ops import _library

from . import profiling
from .calls import (
    DTYPES,
    FIXED_POINT_TOLERANCE,
    OPERATORS,
    TOLERANCE,
    Call,
    deterministic,
    drawn,
    float32_in,
    name_of,
    small,
)
from .sections import Case, Wrong
from .settings import Settings

# Vectors of every width, and one channel at a time.
_CHANNELS = {"vectors": 16, "scalars": 5}
# These have a gradient of the input that is the same in every run.
_DETERMINISTIC = OPERATORS[:3]


def variants(settings: Settings) -> list[Case]:
    """A small call for each kernel: every operator, dtype, width, and way of adding."""
    found = []
    for operator in OPERATORS:
        for dtype in DTYPES[:1] if settings.tiny else DTYPES:
            for width, channels in _CHANNELS.items():
                name = f"{operator}, {name_of(dtype)}, {width}"
                call = functools.partial(small, operator, channels)
                found.append(_case(settings, name, call, dtype))
                if operator in _DETERMINISTIC:
                    found.append(_case(settings, f"{name}, deterministic", call, dtype, True))
    for dtype in (torch.float16, torch.bfloat16):
        name = f"deform_conv2d, {name_of(dtype)}, columns in float32"
        run = functools.partial(_with_wide_columns, settings, name_of(dtype), dtype)
        found.append(Case(name, run))
    run = functools.partial(_check, settings, functools.partial(small, OPERATORS[1], 16), None)
    found.append(Case("deform_conv2d, tf32", run))
    return found


def random_problems(settings: Settings) -> list[Case]:
    """Drawn problems of every operator, in every dtype."""
    seeds, dtypes = (range(1), DTYPES[:1]) if settings.tiny else (range(16), DTYPES)
    return [
        Case(
            f"{operator}, {name_of(dtype)}",
            functools.partial(_several, settings, operator, dtype, seeds),
        )
        for operator in OPERATORS
        for dtype in dtypes
    ]


def _case(settings: Settings, name: str, call, dtype: torch.dtype, fixed: bool = False) -> Case:
    return Case(name, functools.partial(_check, settings, call, dtype, fixed))


def _check(
    settings: Settings, make_call, dtype: torch.dtype | None, fixed_point: bool = False
) -> dict:
    """The errors of a call, and the kernels that computed it; dtype None stands for TF32."""
    call: Call = make_call()
    bound = 1e-3 if dtype is None else TOLERANCE[dtype]
    if fixed_point:
        bound = max(bound, FIXED_POINT_TOLERANCE)
    found = {}

    def compute() -> None:
        found.update(call.errors(settings.target, dtype or torch.float32))

    in_order = deterministic() if fixed_point else contextlib.nullcontext()
    with float32_in("tf32" if dtype is None else "float32"), in_order:
        seen = profiling.kernels(compute, settings.target)
    parts = ("gather_kernel", "scatter_kernel") if call.operator.startswith("deform_conv") else ()
    ours = {n: t for n, t in seen.items() if profiling.OURS[settings.device] in n}
    result = {"errors": found, "bound": bound, "kernels": ours, "kernels_seen": len(seen)}
    wrong = [f"{n}: error {e:.1e}" for n, e in found.items() if not e <= bound]
    if (problem := profiling.problem(seen, settings.target, parts)) is not None:
        wrong.append(problem)
    if wrong:
        raise Wrong(wrong, result)
    return result


def _with_wide_columns(settings: Settings, arithmetic: str, dtype: torch.dtype) -> dict:
    """The weight's gradient where torch cannot add half types up in float32."""
    with product_by(settings, "grad_weight", arithmetic, "matmul"):
        return _check(settings, functools.partial(small, "deform_conv2d", 16), dtype)


def _several(settings: Settings, operator: str, dtype: torch.dtype, seeds: range) -> dict:
    worst: dict[str, float] = {}
    wrong = []
    with float32_in("float32"):
        for seed in seeds:
            for name, error in drawn(operator, seed).errors(settings.target, dtype).items():
                worst[name] = max(error, worst.get(name, 0.0))
                if not error <= TOLERANCE[dtype]:
                    wrong.append(f"{name} of problem {seed}: error {error:.1e}")
    result = {"errors": worst, "bound": TOLERANCE[dtype], "problems": len(seeds)}
    if wrong:
        raise Wrong(wrong, result)
    return result


@contextlib.contextmanager
def product_by(settings: Settings, product: str, arithmetic: str, call: str) -> Iterator[None]:
    """Have one of torch's operators compute a matrix product of convolutions on CUDA."""
    if settings.tiny or not _library.cuda_is_loaded():
        yield
        return
    key = settings.target.index, product, arithmetic
    before = torch.ops.mmdcn.cuda_product(*key)
    torch.ops.mmdcn.set_cuda_product(*key, call)
    try:
        yield
    finally:
        torch.ops.mmdcn.set_cuda_product(*key, before)
