"""Every kernel variant once, and drawn problems: are the results right?"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from mmdcn import self_test
from mmdcn.ops import _devices, _library

from . import profiling
from .calls import DTYPES, FIXED_POINT_TOLERANCE, OPERATORS, deterministic, drawn, float32_in, small
from .sections import Case, Wrong
from .settings import Settings

# Vectors of channels, and one channel at a time.
_CHANNELS = {"vectors": 16, "scalars": 5}
# These have a gradient of the input that is the same in every run.
_DETERMINISTIC = OPERATORS[:3]
# Those first of which a sanitizer has the time to run all cases.
_DTYPES = ("float32", "float16", "bfloat16", "float64")
#: The number of cases of the first two.
OF_TWO_DTYPES = 2 * (3 * len(OPERATORS) + 2 * len(_DETERMINISTIC))
_SMALL_CHUNK = 5000  # bytes
TF32_TOLERANCE = 1e-3


def variants(settings: Settings) -> list[Case]:
    """A small call for each kernel: every operator, dtype, width, and way of adding."""
    found = {}
    for dtype in _DTYPES[:1] if settings.tiny else _DTYPES:
        for operator in OPERATORS:
            check = functools.partial(_check, settings, operator, arithmetic=dtype)
            for width, channels in _CHANNELS.items():
                name = f"{operator}, {dtype}, {width}"
                found[name] = functools.partial(check, channels=channels)
                if operator in _DETERMINISTIC:
                    found[f"{name}, deterministic"] = functools.partial(
                        check, channels=channels, in_fixed_point=True
                    )
            # Below compute capability 9.0, the only one that goes through vectors backward.
            found[f"{operator}, {dtype}, no gradient of the input"] = functools.partial(
                check, channels=_CHANNELS["vectors"], constant=("input",)
            )
    for dtype in ("float16",) if settings.tiny else ("float16", "bfloat16"):
        for operator in ("deform_conv2d", "deform_conv3d"):
            for width, channels in _CHANNELS.items():
                found[f"{operator}, {dtype}, {width}, columns in float32"] = functools.partial(
                    _check_with_wide_columns, settings, operator, channels, dtype
                )
    for dtype in ("float32", "float64"):
        found[f"deform_conv2d, {dtype}, several chunks"] = functools.partial(
            _check_in_chunks, settings, dtype
        )
    found["deform_conv2d, tf32"] = functools.partial(_check, settings, "deform_conv2d", 16, "tf32")
    return [Case(name, run) for name, run in found.items()]


def _check(
    settings: Settings,
    operator: str,
    channels: int,
    arithmetic: str,
    in_fixed_point: bool = False,
    constant: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
) -> dict:
    """The errors of a small call, and the kernels that computed it.

    Args:
        settings, operator, channels, arithmetic: of the call.
        in_fixed_point: the gradient of the input is to be the same in every run.
        constant: nothing is differentiated for these.
        parts: of names, each of which one of the kernels must have.
    """
    call = small(operator, channels)
    call = replace(call, constant=(*call.constant, *constant))
    bound = tolerance(arithmetic)
    if in_fixed_point:
        bound = max(bound, FIXED_POINT_TOLERANCE)
    dtype, found = DTYPES.get(arithmetic, torch.float32), {}

    def compute() -> None:
        found.update(self_test.errors(operator, call, settings.target, dtype))

    in_order = deterministic() if in_fixed_point else contextlib.nullcontext()
    with float32_in(arithmetic), in_order:
        seen = profiling.kernels(compute, settings.target)
    if operator.startswith("deform_conv"):
        parts = ("gather_kernel", "scatter_kernel", *parts)
    ours = {n: t for n, t in seen.items() if profiling.OURS[settings.device] in n}
    result = {"errors": found, "bound": bound, "kernels": ours, "kernels_seen": len(seen)}
    wrong = [f"{n}: error {e:.1e}" for n, e in found.items() if not e <= bound]
    if (problem := profiling.problem(seen, settings.target, parts)) is not None:
        wrong.append(problem)
    if wrong:
        raise Wrong(wrong, result)
    return result


def _check_with_wide_columns(settings: Settings, operator: str, channels: int, dtype: str) -> dict:
    """The weight's gradient where torch cannot add half types up in float32."""
    with product_by(settings, "grad_weight", dtype, "matmul"):
        return _check(settings, operator, channels, dtype)


def _check_in_chunks(settings: Settings, dtype: str) -> dict:
    """Columns that do not all fit the memory for them."""
    with in_chunks_of(settings, _SMALL_CHUNK):
        return _check(settings, "deform_conv2d", 16, dtype, parts=("accumulate_kernel",))


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
        torch.ops.mmdcn.set_cuda_product(*key, before, may_be_replaced=True)


@contextlib.contextmanager
def in_chunks_of(settings: Settings, size: int) -> Iterator[None]:
    """Have convolutions on CUDA work on so many bytes of columns at a time; 0: as they would."""
    if settings.tiny or not _library.cuda_is_loaded():
        yield
        return
    torch.ops.mmdcn.set_cuda_chunk(size)
    try:
        yield
    finally:
        torch.ops.mmdcn.set_cuda_chunk(0)


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
