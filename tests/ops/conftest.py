"""What tests of several operators share."""

import sys

import pytest
import torch

from mmdcn import mmcv_kernels
from mmdcn.ops import _devices, reference


@pytest.fixture
def mmcv_offered(monkeypatch):
    """mmcv's kernels, by its CPU operators; where there are none, by the reference.

    mmcv has no RoI pooling on the CPU.
    """
    v1 = pytest.importorskip("mmcv.ops.deform_conv")
    v2 = sys.modules["mmcv.ops.modulated_deform_conv"]
    apply = torch.autograd.Function.apply.__func__
    monkeypatch.setattr(_devices, "_offered", {})
    mmcv_kernels.offer(
        lambda *arguments: apply(v1.DeformConv2dFunction, *arguments),
        lambda *arguments: apply(v2.ModulatedDeformConv2dFunction, *arguments),
        reference.deform_roi_pool,
    )


@pytest.fixture
def deterministic():
    """torch refuses what is not deterministic, and fills memory that nobody has set with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
