"""What the device could do at best: moving, multiplying, gathering and adding, as torch does it."""

import functools
from collections.abc import Callable

import torch

from mmdcn import timing

from .calls import float32_in
from .sections import Case
from .settings import Settings

# Tables that fit the second-level cache of a large device, and that fit none.
_TABLES = {"of 8 MiB": 2**23, "of 512 MiB": 2**29}


def cases(settings: Settings) -> list[Case]:
    found = {"copy": _copy, "read": _read}
    for arithmetic in ("float32", "tf32", "float16", "bfloat16", "float64"):
        found[f"matrix product, {arithmetic}"] = functools.partial(_matmul, arithmetic=arithmetic)
    for table, size in _TABLES.items():
        for width in (64, 128):
            name = f"gather rows of {width} bytes from a table {table}"
            found[name] = functools.partial(_gather, width=width, size=size)
        name = f"add rows of 128 float32 to a table {table}, in any order"
        found[name] = functools.partial(_add_rows, dtype=torch.float32, size=size)
        name = f"add rows of 128 float16 to a table {table}, in any order"
        found[name] = functools.partial(_add_rows, dtype=torch.float16, size=size)
        name = f"add single float32 to a table {table}, in any order"
        found[name] = functools.partial(_add_single, size=size)
    return [Case(name, functools.partial(run, settings)) for name, run in found.items()]


def _rate(settings: Settings, call: Callable[[], object], amount: float, unit: str) -> dict:
    """How much a call does in a second; `amount` is in thousand millions."""
    samples = timing.interleave({"call": timing.Call(call)}, settings.target, settings.budget)
    milliseconds = timing.median(samples["call"])
    return {"milliseconds": milliseconds, "rate": 1000 * amount / milliseconds, "unit": unit}


def _elements(settings: Settings, of_a_gpu: int) -> int:
    return 2**12 if settings.tiny else of_a_gpu


def _copy(settings: Settings) -> dict:
    source = torch.ones(_elements(settings, 2**28), device=settings.target)
    target = torch.empty_like(source)
    return _rate(settings, lambda: target.copy_(source), 2 * source.nbytes / 1e9, "GB/s")


def _read(settings: Settings) -> dict:
    source = torch.ones(_elements(settings, 2**28), device=settings.target)
    return _rate(settings, source.sum, source.nbytes / 1e9, "GB/s")


def _matmul(settings: Settings, arithmetic: str) -> dict:
    dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
    size = 32 if settings.tiny else 4096 if arithmetic in ("float32", "float64") else 8192
    a, b = (torch.randn(size, size, device=settings.target).to(dtype) for _ in range(2))
    with float32_in(arithmetic):
        return _rate(settings, lambda: a @ b, 2 * size**3 / 1e9, "GFLOP/s")


def _indices(settings: Settings, count: int, rows: int) -> torch.Tensor:
    generator = torch.Generator(settings.target).manual_seed(0)
    return torch.randint(rows, (count,), generator=generator, device=settings.target)


def _gather(settings: Settings, width: int, size: int) -> dict:
    rows = _elements(settings, size) // width
    table = torch.ones(rows, width // 4, device=settings.target)
    index = _indices(settings, _elements(settings, 2**22), rows)
    target = torch.empty(len(index), width // 4, device=settings.target)
    call = functools.partial(torch.index_select, table, 0, index, out=target)
    return _rate(settings, call, target.nbytes / 1e9, "GB/s gathered")


def _add_rows(settings: Settings, dtype: torch.dtype, size: int) -> dict:
    rows = max(1, _elements(settings, size) // (128 * dtype.itemsize))
    table = torch.zeros(rows, 128, dtype=dtype, device=settings.target)
    index = _indices(settings, _elements(settings, 2**19) // 8, rows)
    values = torch.ones(len(index), 128, dtype=dtype, device=settings.target)
    call = functools.partial(table.index_add_, 0, index, values)
    return _rate(settings, call, values.numel() / 1e9, "thousand million additions/s")


def _add_single(settings: Settings, size: int) -> dict:
    elements = _elements(settings, size) // 4
    table = torch.zeros(elements, device=settings.target)
    index = _indices(settings, _elements(settings, 2**23), elements)
    values = torch.ones(len(index), device=settings.target)
    call = functools.partial(table.scatter_add_, 0, index, values)
    return _rate(settings, call, values.numel() / 1e9, "thousand million additions/s")
