"""The layers by themselves, and against mmcv's layers of the same name."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdcn import layers
from mmdcn.layers import deform_conv as module
from tests.programs import run_python

NAMES = (
    "DeformConv2d",
    "DeformConv2dPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
)
PACKS = ("DeformConv2dPack", "ModulatedDeformConv2dPack")

SETTINGS = {
    "plain": dict(in_channels=6, out_channels=4, kernel_size=3, padding=1),
    "strided": dict(in_channels=6, out_channels=4, kernel_size=3, padding=1, stride=2),
    "dilated": dict(in_channels=6, out_channels=4, kernel_size=3, padding=2, dilation=2),
    "oblong": dict(
        in_channels=6,
        out_channels=4,
        kernel_size=(1, 5),
        stride=(2, 1),
        padding=(1, 4),
        dilation=(1, 2),
    ),
    "grouped": dict(
        in_channels=12, out_channels=8, kernel_size=3, padding=1, groups=2, deform_groups=3
    ),
    "pointwise": dict(in_channels=4, out_channels=4, kernel_size=1, deform_groups=4),
}


def randomize_offset_branch(layer: nn.Module) -> None:
    if hasattr(layer, "conv_offset"):
        nn.init.normal_(layer.conv_offset.weight, std=0.3)
        nn.init.normal_(layer.conv_offset.bias)


def inputs_for(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """`x`, and the offset and mask that the layer wants beside it, as leaves."""
    if hasattr(layer, "conv_offset"):
        return [x.requires_grad_()]
    taps = layer.deform_groups * layer.kernel_size[0] * layer.kernel_size[1]
    out = F.conv2d(
        x[:, :1],
        x.new_zeros(1, 1, *layer.kernel_size),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
    )
    inputs = [x, 2 * torch.randn(len(x), 2 * taps, *out.shape[2:], dtype=x.dtype)]
    if "Modulated" in type(layer).__name__:
        inputs.append(torch.rand(len(x), taps, *out.shape[2:], dtype=x.dtype))
    return [t.requires_grad_() for t in inputs]


def results(layer: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of all inputs and parameters."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    output = layer(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), [*inputs, *layer.parameters()])
    return [output.detach(), *gradients]


# ------------------------------------------------------------------------------------ beside mmcv


@pytest.fixture
def mmcv_ops():
    """mmcv.ops, by its own kernels."""
    mmcv_ops = pytest.importorskip("mmcv.ops")
    from mmdcn import plugin

    plugin.uninstall()
    yield mmcv_ops
    plugin.install()


def pair_of_layers(mmcv_ops, name: str, **settings) -> tuple[nn.Module, nn.Module]:
    made = []
    for library in (layers, mmcv_ops):
        torch.manual_seed(3)
        made.append(getattr(library, name)(**settings))
    return tuple(made)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_same_initial_state_output_and_gradients_as_mmcv(mmcv_ops, name, settings):
    ours, theirs = pair_of_layers(mmcv_ops, name, **settings)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key

    randomize_offset_branch(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours, theirs = ours.double(), theirs.double()
    inputs = inputs_for(ours, torch.randn(3, settings["in_channels"], 9, 11).double())
    for mine, expected in zip(results(ours, inputs), results(theirs, inputs)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"DeformConv2dPack"}))  # There, mmcv fails.
@pytest.mark.parametrize(("size", "stride"), [((2, 7), 1), ((7, 1), 1), ((2, 2), 2)])
def test_input_smaller_than_the_kernel_as_mmcv(mmcv_ops, name, size, stride):
    ours, theirs = pair_of_layers(
        mmcv_ops, name, in_channels=2, out_channels=3, kernel_size=3, padding=1, stride=stride
    )
    randomize_offset_branch(ours)
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.double(), theirs.double()
    inputs = inputs_for(ours, torch.randn(2, 2, *size).double())
    for mine, expected in zip(results(ours, inputs), results(theirs, inputs)):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_both_ways(mmcv_ops, name):
    ours, theirs = pair_of_layers(
        mmcv_ops, name, in_channels=4, out_channels=4, kernel_size=3, deform_groups=2
    )
    for source, target in ((ours, theirs), (theirs, ours)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict(), strict=True)
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value), key
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


# ---------------------------------------------------------------------------------- by themselves


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("size", [(9, 11), (2, 1)])
@pytest.mark.parametrize(("name", "scale"), [(PACKS[0], 1.0), (PACKS[1], 0.5)])
def test_a_fresh_layer_is_its_plain_convolution(name, scale, size, settings):
    layer = getattr(layers, name)(**settings).double()
    x = torch.randn(2, settings["in_channels"], *size, dtype=torch.float64)
    plain = F.conv2d(
        x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    torch.testing.assert_close(layer(x), scale * plain, rtol=1e-13, atol=1e-13)


def test_modulation_scale():
    x = torch.randn(2, 4, 7, 6)
    layer = layers.ModulatedDeformConv2dPack(4, 4, 3, padding=1, modulation_scale=2)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert repr(layer).splitlines()[1].endswith("bias=True, modulation_scale=2")

    # Half the weight and twice the modulation, anywhere.
    paper = layers.ModulatedDeformConv2dPack(4, 4, 3, padding=1)
    randomize_offset_branch(layer)
    layer.bias.data.normal_()
    paper.load_state_dict(layer.state_dict() | {"weight": 2 * layer.weight.detach()})
    torch.testing.assert_close(layer(x), paper(x))

    for wrong in (0, -1, float("inf"), float("nan"), "2"):
        with pytest.raises(ValueError, match="modulation_scale: expected a number above 0, got"):
            layers.ModulatedDeformConv2dPack(4, 4, 3, modulation_scale=wrong)


@pytest.mark.parametrize("name", PACKS)
def test_init_weights_zeroes_the_offset_branch(name):
    layer = getattr(layers, name)(4, 4, 3)
    randomize_offset_branch(layer)
    layer.init_weights()
    assert not any(p.any() for p in layer.conv_offset.parameters())
    assert layer.weight.all()


def test_bias_in_v1():
    layer = layers.DeformConv2dPack(4, 6, 3, padding=1, bias=True).double()
    randomize_offset_branch(layer)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    without = layers.DeformConv2dPack(4, 6, 3, padding=1).double()
    assert without.load_state_dict(layer.state_dict(), strict=False).unexpected_keys == ["bias"]
    torch.testing.assert_close(layer(x), without(x) + layer.bias.view(-1, 1, 1))
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 128.0, dtype=torch.float64))


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("batch", [0, 33])
def test_any_batch_size(name, batch):
    layer = getattr(layers, name)(2, 3, 3, padding=1)
    x = torch.randn(batch, 2, 4, 4, requires_grad=True)
    output = layer(x)
    output.sum().backward()
    assert output.shape == (batch, 3, 4, 4)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("name", PACKS)
def test_autocast(name):
    layer = getattr(layers, name)(4, 6, 3, padding=1)
    randomize_offset_branch(layer)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.conv_offset.weight.grad.any()


class Block(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv2 = layer
        # The plugin's hook does this, where there is one: the layers are tested without it too.
        module.accept_old_keys_in_parent(self, "conv2", layer)


def old_state_dict(block: Block) -> dict[str, torch.Tensor]:
    """The block's state as the first versions of the toolbox wrote it, without metadata."""
    return {
        key.replace("conv2.conv_offset", "conv2_offset"): value.clone()
        for key, value in block.state_dict().items()
    }


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("loader", ["torch", "mmengine"])
def test_old_key_names_load(name, loader):
    source, target = (Block(getattr(layers, name)(4, 4, 3)) for _ in range(2))
    randomize_offset_branch(source.conv2)
    old = old_state_dict(source)
    assert "conv2_offset.weight" in old
    if loader == "torch":
        target.load_state_dict(old, strict=True)
    else:
        pytest.importorskip("mmengine").runner.load_state_dict(target, old, strict=True)
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_another_module_keeps_the_old_key():
    block = Block(layers.DeformConv2dPack(4, 4, 3))
    block.conv2_offset = nn.Conv2d(4, 18, 3)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    for parameter in ("weight", "bias"):
        del state[f"conv2.conv_offset.{parameter}"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv2\.conv_offset\.weight"):
        block.load_state_dict(state)


def test_a_copied_parent_still_loads_old_keys():
    block = Block(layers.DeformConv2dPack(4, 4, 3))
    randomize_offset_branch(block.conv2)
    for target in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        target.conv2.init_offset()
        target.load_state_dict(old_state_dict(block), strict=True)
        assert torch.equal(target.conv2.conv_offset.weight, block.conv2.conv_offset.weight)


@pytest.mark.parametrize("name", NAMES)
def test_old_arguments_are_accepted_with_one_log_line(name, caplog):
    module._warn_once.cache_clear()
    layer_type = getattr(layers, name)
    with caplog.at_level(logging.WARNING, logger="mmdcn"):
        for _ in range(3):
            layer = layer_type(8, 8, 3, deformable_groups=4)
        assert layer.deform_groups == 4
        assert len(caplog.records) == 1
        assert "deform_groups" in caplog.text
        caplog.clear()
        for _ in range(3):
            layer_type(8, 8, 3, im2col_step=64)
        assert len(caplog.records) == 1
        assert "im2col_step" in caplog.text
        caplog.clear()
        layer_type(8, 8, 3)
        assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(in_channels=0), "in_channels: .* at least 1, got 0"),
        (dict(out_channels=2.0), "out_channels: .* got 2.0"),
        (dict(kernel_size=0), "kernel_size: .* at least 1, got 0"),
        (dict(kernel_size=(3, 3, 3)), "kernel_size: expected an int or a pair"),
        (dict(stride=(1, 0)), "stride: .* at least 1"),
        (dict(padding=-1), "padding: .* at least 0, got -1"),
        (dict(padding="same"), "padding: .* got 'same'"),
        (dict(dilation=0), "dilation: .* at least 1"),
        (dict(groups=4), "in_channels: expected a multiple of groups=4, got 6"),
        (dict(groups=3), "out_channels: expected a multiple of groups=3, got 8"),
        (dict(groups=0), "groups: .* at least 1"),
        (dict(deform_groups=4), "in_channels: expected a multiple of deform_groups=4, got 6"),
        (dict(deform_groups=-1), "deform_groups: .* at least 1"),
        (dict(deform_groups=2, deformable_groups=3), "deformable_groups: .* only one"),
    ],
)
def test_bad_arguments(name, arguments, message):
    good = dict(in_channels=6, out_channels=8, kernel_size=3)
    with pytest.raises(ValueError, match=message):
        getattr(layers, name)(**(good | arguments))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", PACKS)
def test_copies_compute_the_same(name, duplicate):
    layer = getattr(layers, name)(4, 6, (3, 1), padding=(1, 0), deform_groups=2)
    randomize_offset_branch(layer)
    x = torch.randn(2, 4, 5, 6)
    copied = duplicate(layer)
    assert copied.weight is not layer.weight
    assert torch.equal(copied(x), layer(x))


def test_representation_names_what_matters():
    text = repr(layers.ModulatedDeformConv2dPack(4, 6, 3, padding=1, deform_groups=2))
    assert text.startswith("ModulatedDeformConv2dPack(\n  4, 6, kernel_size=(3, 3)")
    assert "deform_groups=2, bias=True" in text
    assert "(conv_offset): Conv2d(4, 54" in text


def test_no_toolbox_is_needed():
    code = """
import sys
for name in ("mmcv", "mmengine", "mmdet"):
    sys.modules[name] = None  # Importing it fails.
import torch
import mmdcn.layers
print(mmdcn.layers.ModulatedDeformConv2dPack(2, 3, 3)(torch.ones(1, 2, 4, 4)).shape)
"""
    assert run_python("-c", code).strip() == "torch.Size([1, 3, 2, 2])"
