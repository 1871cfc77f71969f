"""Which kernels ran, and for how long: what torch.profiler saw, and what ncu is to count."""

import contextlib
import re
from collections.abc import Callable, Iterator

import torch

# What the names of our kernels have, where the profiler shows kernels, and where operators.
OURS = {"cuda": "mmdcn::cuda::", "cpu": "mmdcn::"}


def kernels(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Microseconds that each kernel took in one call, by short names; operators on the CPU.

    It is empty where the profiler sees nothing, as where CUPTI does not work.
    """
    on_cuda = device.type == "cuda"
    kind = torch.profiler.ProfilerActivity
    activities = [kind.CUDA] if on_cuda else [kind.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
    taken = {}
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if on_cuda and not microseconds:
            continue
        name = short_name(event.key)
        taken[name] = round(taken.get(name, 0.0) + microseconds, 2)
    return dict(sorted(taken.items(), key=lambda item: -item[1]))


@contextlib.contextmanager
def counted(device: torch.device) -> Iterator[None]:
    """What runs in this context is counted by ncu, if its `--profile-from-start` is off."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()


def short_name(kernel: str) -> str:
    """A kernel's name without what does not tell it from others."""
    # torch's profiler and ncu call namespaces without a name differently, and ncu may cut the
    # namespaces before them off, with the bracket.
    name = re.sub(r"(\(anonymous namespace\)|<?\bunnamed>)::", "", kernel.removeprefix("void "))
    name = re.sub(r"\(.*", "", name)  # the types of its arguments
    return name if len(name) <= 120 else f"{name[:117]}..."


def problem(
    found: dict[str, float], device: torch.device, expected: tuple[str, ...] = ()
) -> str | None:
    """What is wrong with the kernels that ran; None if they are ours.

    Args:
        found: what :func:`kernels` returned.
        device: where.
        expected: parts of names, each of which one of our kernels on CUDA must have.
    """
    if not found:
        return None  # nothing was seen, which the report says
    ours = [name for name in found if OURS[device.type] in name]
    if not ours:
        return f"none of the kernels that ran are ours: {', '.join(list(found)[:5])}"
    missing = [part for part in expected if not any(part in name for name in ours)]
    if device.type == "cuda" and missing:
        return f"no {' and no '.join(missing)} among our kernels that ran: {', '.join(ours)}"
    return None
