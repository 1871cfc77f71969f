"""What PyTorch's tools do to a model: copies, wrappers for several processes, checkpointing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from tests.layers import examples
from tests.programs import run_python
from tests.pytorch.models import assert_same, backbone, gradients, layer, loss

NAMES = pytest.mark.parametrize("name", ["DCN", "DCNv2"])


@NAMES
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_copies(name, duplicate):
    pytest.importorskip("mmdet")
    model = backbone(name, blocks=2)
    x = torch.randn(1, 3, 64, 64)
    copied = duplicate(model)
    assert_same(gradients(copied, x), gradients(model, x), rtol=0)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert all(p.any() for name, p in model.named_parameters() if name.endswith("conv2.weight"))


@NAMES
def test_same_bits_in_every_run_and_for_any_number_of_threads(name):
    model = layer(name)
    x = torch.randn(2, 8, 40, 41)
    expected = gradients(model, x)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert_same(gradients(model, x), expected, rtol=0)
    torch.set_num_threads(2)


@NAMES
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(name, use_reentrant):
    model = layer(name)
    x = torch.randn(2, 8, 9, 11, requires_grad=True)
    expected = torch.autograd.grad(loss(model(x)), [x, *model.parameters()])
    loss(checkpoint(model, x, use_reentrant=use_reentrant)).backward()
    for actual, value in zip((x, *model.parameters()), expected):
        assert torch.equal(actual.grad, value)


@NAMES
def test_a_backbone_with_checkpointing(name):
    pytest.importorskip("mmdet")
    x = torch.randn(1, 3, 64, 64)
    model, saving = (backbone(name, blocks=2, with_cp=with_cp) for with_cp in (False, True))
    saving.load_state_dict(model.state_dict())
    assert_same(gradients(saving, x), gradients(model, x))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2

    def right_inverse(self, weight):
        return weight * 2


@NAMES
def test_parametrized_weights(name):
    model = layer(name)
    x = torch.randn(2, 8, 9, 11)
    expected = model(x)
    parametrize.register_parametrization(model, "weight", Halved())
    parametrize.register_parametrization(model.conv_offset, "weight", Halved())
    assert torch.equal(model(x), expected)
    loss(model(x)).backward()
    assert model.parametrizations.weight.original.grad.any()
    assert model.conv_offset.parametrizations.weight.original.grad.any()
    parametrize.remove_parametrizations(model, "weight")
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(weight_norm(model)(x), expected)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_two_processes(wrapper):
    """Gradients over two processes, with half of the batch each, are those of the whole."""
    pytest.importorskip("mmdet")
    printed = run_python("-m", "tests.pytorch.distributed_script", wrapper)
    with_parameters = [name for name in examples.NAMES if list(examples.build(name).parameters())]
    for name in ("DCN", "DCNv2", *with_parameters):
        assert f"{name}: same as in one process" in printed, printed
