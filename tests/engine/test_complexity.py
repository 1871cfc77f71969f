"""mmengine's counts of operations and activations, against counts by hand."""

import pytest
import torch

pytest.importorskip("mmcv.ops")

from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer, get_model_complexity_info
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmdcn  # noqa: F401
from tests.pytorch.models import PACKS, backbone

# Of a layer from 8 to 12 channels in 2 groups with a stride of 2, on a 9 × 11 image: 5 × 6 outputs.
POSITIONS, TAPS = 5 * 6, 9


@pytest.mark.parametrize(("name", "per_tap"), [("DCN", 2), ("DCNv2", 3)])
def test_layer(name, per_tap):
    model = PACKS[name](8, 12, 3, stride=2, padding=1, groups=2, deform_groups=4)
    branch = 4 * per_tap * TAPS
    by_hand = {
        "conv": POSITIONS * branch * 8 * TAPS,
        "deform_conv": POSITIONS * 12 * (8 // 2) * TAPS,
    }
    x = torch.randn(1, 8, 9, 11)
    assert FlopAnalyzer(model, x).by_operator() == by_hand
    activations = {"conv": POSITIONS * branch, "deform_conv": POSITIONS * 12}
    assert ActivationAnalyzer(model, x).by_operator() == activations
    information = get_model_complexity_info(model, inputs=(x,), show_table=False, show_arch=False)
    assert information["flops"] == sum(by_hand.values())
    assert information["activations"] == sum(activations.values())
    # There, a multiplication and its addition are two operations.
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() == 2 * sum(by_hand.values())


@pytest.mark.parametrize(("name", "per_tap"), [("DCN", 2), ("DCNv2", 3)])
def test_backbone_has_the_plain_ones_counts_and_those_of_the_branches(name, per_tap):
    pytest.importorskip("mmdet")
    deformable = backbone(name, training=False)
    plain = backbone(None, training=False)
    branches = [m.conv_offset for m in deformable.modules() if hasattr(m, "conv_offset")]
    flops = activations = 0
    # Of a 64 × 64 image: 8 × 8 positions in c3, then 4 × 4, then 2 × 2.
    for branch, positions in zip(branches, [64] * 4 + [16] * 6 + [4] * 3):
        assert isinstance(branch, nn.Conv2d)
        activations += positions * per_tap * TAPS
        flops += positions * per_tap * TAPS * branch.in_channels * TAPS
    counts = [
        get_model_complexity_info(model, (3, 64, 64), show_table=False, show_arch=False)
        for model in (deformable, plain)
    ]
    assert counts[0]["flops"] - counts[1]["flops"] == flops
    assert counts[0]["activations"] - counts[1]["activations"] == activations
