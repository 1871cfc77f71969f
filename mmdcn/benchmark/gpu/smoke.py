"""Every kernel variant once, and drawn problems: are the results right?"""

import contextlib
import functools
from collections.abc import Iterator

import torch

from mmdcn import self_test
from mmdcn.ops import _devices

from . import profiling
from .calls import DTYPES, FIXED_POINT_TOLERANCE, OPERATORS, deterministic, drawn, float32_in, small
from .sections import Case, Wrong
from .settings import Settings

# Vectors of channels, and one channel at a time.
_CHANNELS = {"vectors": 16, "scalars": 5}
# These have a gradient of the input that is the same in every run.
_DETERMINISTIC = OPERATORS[:3]
TF32_TOLERANCE = 1e-3


def variants(settings: Settings) -> list[Case]:
    """A small call for each kernel: every operator, dtype, width, and way of adding."""
    found = []
    for operator in OPERATORS:
        for dtype in list(DTYPES)[:1] if settings.tiny else DTYPES:
            for width, channels in _CHANNELS.items():
                check = functools.partial(_check, settings, operator, channels, dtype)
                found.append(Case(f"{operator}, {dtype}, {width}", check))
                if operator in _DETERMINISTIC:
                    fixed = functools.partial(check, in_fixed_point=True)
                    found.append(Case(f"{operator}, {dtype}, {width}, deterministic", fixed))
    for dtype in ("float16", "bfloat16"):
        wide = functools.partial(_check_with_wide_columns, settings, dtype)
        found.append(Case(f"deform_conv2d, {dtype}, columns in float32", wide))
    tf32 = functools.partial(_check, settings, "deform_conv2d", 16, "tf32")
    return [*found, Case("deform_conv2d, tf32", tf32)]


def _check(
    settings: Settings, operator: str, channels: int, arithmetic: str, in_fixed_point: bool = False
) -> dict:
    """The errors of a small call, and the kernels that computed it."""
    call = small(operator, channels)
    bound = tolerance(arithmetic)
    if in_fixed_point:
        bound = max(bound, FIXED_POINT_TOLERANCE)
    dtype, found = DTYPES.get(arithmetic, torch.float32), {}

    def compute() -> None:
        found.update(self_test.errors(operator, call, settings.target, dtype))

    in_order = deterministic() if in_fixed_point else contextlib.nullcontext()
    with float32_in(arithmetic), in_order:
        seen = profiling.kernels(compute, settings.target)
    parts = ("gather_kernel", "scatter_kernel") if operator.startswith("deform_conv") else ()
    ours = {n: t for n, t in seen.items() if profiling.OURS[settings.device] in n}
    result = {"errors": found, "bound": bound, "kernels": ours, "kernels_seen": len(seen)}
    wrong = [f"{n}: error {e:.1e}" for n, e in found.items() if not e <= bound]
    if (problem := profiling.problem(seen, settings.target, parts)) is not None:
        wrong.append(problem)
    if wrong:
        raise Wrong(wrong, result)
    return result


def _check_with_wide_columns(settings: Settings, dtype: str) -> dict:
    """The weight's gradient where torch cannot add half types up in float32."""
    with product_by(settings, "grad_weight", dtype, "matmul"):
        return _check(settings, "deform_conv2d", 16, dtype)


def tolerance(arithmetic: str) -> float:
    """The largest error of a right result, relative to the largest element."""
    if arithmetic == "tf32":
        return TF32_TOLERANCE
    return self_test.TOLERANCE[DTYPES.get(arithmetic, torch.float32)]


def product_in_force(settings: Settings, product: str, arithmetic: str) -> str | None:
    """Which of torch's operators computes a matrix product of convolutions on CUDA."""
    # The first call on a device chooses them, which must not come later.
    if settings.tiny or not _devices.service(settings.target).kernels:
        return None
    return torch.ops.mmdcn.cuda_product(settings.target.index, product, arithmetic)


@contextlib.contextmanager
def product_by(settings: Settings, product: str, arithmetic: str, call: str) -> Iterator[None]:
    """Have one of torch's operators compute a matrix product of convolutions on CUDA."""
    before = product_in_force(settings, product, arithmetic)
    if before is None:
        yield
        return
    key = settings.target.index, product, arithmetic
    torch.ops.mmdcn.set_cuda_product(*key, call)
    try:
        yield
    finally:
        torch.ops.mmdcn.set_cuda_product(*key, before)


# --------------------------------------------------------------------------------- drawn problems


def random_problems(settings: Settings) -> list[Case]:
    """Drawn problems of every operator, in every dtype."""
    seeds, dtypes = (range(1), list(DTYPES)[:1]) if settings.tiny else (range(16), DTYPES)
    return [
        Case(f"{operator}, {dtype}", functools.partial(_several, settings, operator, dtype, seeds))
        for operator in OPERATORS
        for dtype in dtypes
    ]


def _several(settings: Settings, operator: str, dtype: str, seeds: range) -> dict:
    worst: dict[str, float] = {}
    wrong, bound = [], tolerance(dtype)
    for seed in seeds:
        with float32_in(dtype):
            errors = self_test.errors(
                operator, drawn(operator, seed), settings.target, DTYPES[dtype]
            )
        for name, error in errors.items():
            worst[name] = max(error, worst.get(name, 0.0))
            if not error <= bound:
                wrong.append(f"{name} of problem {seed}: error {error:.1e}")
    result = {"errors": worst, "bound": bound, "problems": len(seeds)}
    if wrong:
        raise Wrong(wrong, result)
    return result
