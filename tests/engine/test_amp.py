"""Mixed precision on the CPU: bfloat16, but float32 inside mmcv's compiled functions."""

import pytest
import torch
from mmcv.ops import RoIAlign, nms
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from mmdcn.engine import amp


@pytest.fixture
def wrapper():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return OPTIM_WRAPPERS.build(dict(type="CPUAmpOptimWrapper", optimizer=optimizer))


def test_the_forward_pass_is_in_bfloat16(wrapper):
    model = nn.Linear(4, 4)
    with wrapper.optim_context(model):
        output = model(torch.ones(2, 4))
    assert output.dtype == torch.bfloat16
    assert model(torch.ones(2, 4)).dtype == torch.float32
    output.sum().backward()
    assert model.weight.grad.dtype == torch.float32


def test_roi_align_computes_in_float32(wrapper):
    rois = torch.tensor([[0.0, 1.2, 1.7, 9.3, 8.1]])
    features = torch.randn(1, 3, 12, 12).bfloat16()
    layer = RoIAlign(4, sampling_ratio=2)
    half = features.clone().requires_grad_()
    full = features.float().requires_grad_()
    output, expected = layer(half, rois), layer(full, rois)
    assert output.dtype == torch.bfloat16 and expected.dtype == torch.float32
    # Bit for bit the float32 result, rounded once.
    assert torch.equal(output, expected.bfloat16())
    gradient = torch.randn_like(output)
    output.backward(gradient)
    expected.backward(gradient.float())
    assert half.grad.dtype == torch.bfloat16
    assert torch.equal(half.grad, full.grad.bfloat16())


def test_nms_takes_bfloat16_scores(wrapper):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    _, keep = nms(boxes, scores.bfloat16(), 0.5)
    assert keep.tolist() == [1, 2] == nms(boxes, scores, 0.5)[1].tolist()


def test_without_bfloat16_nothing_changes(wrapper):
    # Also not when the optimizer wrapper is built again, as a resumed run does.
    OPTIM_WRAPPERS.build(dict(type="CPUAmpOptimWrapper", optimizer=wrapper.optimizer))
    features = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 4, 4]], dtype=torch.float64)
    output = RoIAlign(2)(features, rois)
    assert output.dtype == torch.float64
    output.sum().backward()
    assert features.grad.dtype == torch.float64


def test_enable_chooses_by_device():
    text = "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))"
    cfg = Config.fromstring(text, ".py")
    amp.enable(cfg, on_cpu=False)
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.loss_scale) == ("AmpOptimWrapper", "dynamic")
    amp.enable(cfg, on_cpu=True)
    assert cfg.optim_wrapper.type == "CPUAmpOptimWrapper"
    assert "loss_scale" not in cfg.optim_wrapper
