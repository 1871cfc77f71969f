"""Our kernels switched off, as on a device that they do not serve; and counts of what computes."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn.ops import _devices, _registration

CPU = torch.device("cpu")
# The compiled operators that mmcv has kernels for.
SUBSTITUTES = ("deform_conv2d", "deform_roi_pool")


def switch_off(monkeypatch: pytest.MonkeyPatch, *substitutes: str) -> None:
    """Let mmcv's kernels compute the substitutes on the CPU, and the reference all others."""
    service = _devices.Service(False, frozenset(substitutes), "switched off")
    monkeypatch.setitem(_devices.DECIDED, CPU, service)
    # mmdcn.ops itself would give a function of a module's name, for some modules.
    module = sys.modules["mmdcn.ops.deform_conv"]
    # This is for devices that are known to be served: on the CPU nobody asks.
    monkeypatch.setattr(module, "_goes_straight", lambda *_: False)


class _Ours(TorchDispatchMode):
    def __init__(self, counts: Counter) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts["ours"] += function.namespace == "mmdcn"
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, *, ours: bool = True) -> Iterator[Counter]:
    """Counts calls: of "ours", forward and backward, of "mmcv", forward, and of "reference".

    Args:
        ours: whether to count ours, which stops torch.compile; elsewhere, look at the graphs.
    """
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        by_reference = _registration.Operator.by_reference
        patch.setattr(_registration.Operator, "by_reference", counted("reference", by_reference))
        for name, compute in _devices._offered.items():
            patch.setitem(_devices._offered, name, counted("mmcv", compute))
        if ours:
            stack.enter_context(_Ours(counts))
        yield counts


class Graphs:
    """A backend of torch.compile that keeps the names of what its graphs call."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, example_inputs):
        self.called += [str(node.target) for node in graph.graph.nodes]
        return graph.forward

    @property
    def ours(self) -> bool:
        """Whether any of them is ours."""
        return any("mmdcn" in name for name in self.called)
