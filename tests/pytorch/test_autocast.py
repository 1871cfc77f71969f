"""Mixed precision: what runs in which dtype, and how far sampling points may stray."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdcn.ops import _devices
from tests.ops.calls import CALLS
from tests.pytorch.models import PACKS, backbone, layer, loss

NAMES = pytest.mark.parametrize("name", ["DCN", "DCNv2"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
HEIGHT, WIDTH = 800, 1333
PIXEL = 0.01


@NAMES
@DTYPES
def test_layer(name, dtype):
    model = layer(name, bias=True)
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    expected = model(x)
    with torch.autocast("cpu", dtype):
        output = model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    output.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all()
        assert parameter.grad.any()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_other_half_precision_is_taken(call):
    """As torch's own convolutions take it: autocast's dtype need not be the model's."""
    tensors = call.tensors(torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        output = call.function(**tensors, **call.arguments)
    # RoI pooling keeps what it is given.
    assert output.dtype == (torch.float16 if "rois" in tensors else torch.bfloat16)
    exact = call.reference(**{n: t.double() for n, t in tensors.items()}, **call.arguments)
    torch.testing.assert_close(output.double(), exact, rtol=0.05, atol=0.05)


@NAMES
@DTYPES
def test_backbone_trains(name, dtype):
    pytest.importorskip("mmdet")
    model = backbone(name, blocks=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(2, 3, 64, 64)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", dtype):
            outputs = model(x)
        assert {o.dtype for o in outputs} == {dtype}
        value = loss(outputs)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value))
    assert losses[-1] < losses[0]


def column_parity() -> torch.Tensor:
    """0 in even columns and 1 in odd ones: a sample tells the fraction of its coordinate.

    The result's half precision keeps it to 1/512 of a pixel.
    """
    return torch.arange(WIDTH).remainder(2).float().expand(1, 1, HEIGHT, WIDTH)


@NAMES
@DTYPES
@pytest.mark.parametrize("distance", [-7.265, -0.735, -31.41, 0.0])
def test_sampling_points_at_the_far_corner(name, dtype, distance):
    """The whole of it, as autocast runs a layer: less than 0.01 pixels off."""
    model = PACKS[name](1, 1, 1, bias=False)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.conv_offset.weight)
    model.conv_offset.bias.data = torch.tensor([0.0, distance, 50.0][: 2 if name == "DCN" else 3])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        sampled = model(column_parity())[0, 0, -1, -1].item()
    expected = abs(((WIDTH - 1 + distance) + 1) % 2 - 1)
    assert abs(sampled - expected) < PIXEL


@NAMES
@DTYPES
def test_predicted_offsets_at_the_far_corner(name, dtype):
    """Offsets of up to some 20 pixels that depend on the image, against float64."""
    model = PACKS[name](4, 4, 3, padding=1)
    nn.init.normal_(model.conv_offset.weight, std=1.0)
    x = torch.randn(1, 4, HEIGHT, WIDTH)[..., -16:, -16:].to(dtype).float()
    seen = []
    hook = model.conv_offset.register_forward_hook(lambda module, _, output: seen.append(output))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        model(x)
    hook.remove()
    with torch.no_grad():
        exact = model.conv_offset.double()(x.double())
    channels = 18
    error = (seen[0].double() - exact)[:, :channels].abs().max()
    assert exact[:, :channels].abs().max() > 15
    assert seen[0].dtype == torch.float32
    assert error < 1e-4  # In bfloat16 it would be 0.06.


class Branch(nn.Module):
    """Stands in for the convolution, which has no fake kernel where torch has no CUDA."""

    def __init__(self, branch: nn.Conv2d) -> None:
        super().__init__()
        self.weight = branch.weight

    def forward(self, x):
        assert x.dtype == self.weight.dtype == torch.float32
        assert not torch.is_autocast_enabled("cuda")
        return x.new_empty(len(x), len(self.weight), *x.shape[2:])


@DTYPES
@NAMES
def test_on_cuda_without_a_gpu(name, dtype, monkeypatch):
    """Dtypes and devices of the CUDA path, on tensors that have no values."""
    monkeypatch.setitem(_devices.DECIDED, torch.device("cuda", 0), _devices.Service(True))
    model = layer(name)
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        for module in (model, model.conv_offset):
            module.weight = nn.Parameter(torch.empty(module.weight.shape))
        model.conv_offset = Branch(model.conv_offset)
        model.bias = None
        x = torch.empty(2, 8, 9, 11)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            output = model(x)
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert (output.dtype, output.device.type, output.shape) == (dtype, "cuda", (2, 12, 9, 11))
