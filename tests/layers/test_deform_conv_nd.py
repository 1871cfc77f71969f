"""The layers of deformable convolution over one and three dimensions."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdcn import layers
from mmdcn.ops import reference

RANKS = pytest.mark.parametrize("rank", [1, 3])
PACKS = pytest.mark.parametrize("name", ["DeformConv{}dPack", "ModulatedDeformConv{}dPack"])
CONVOLUTION = {1: F.conv1d, 3: F.conv3d}

SETTINGS = {
    "plain": dict(in_channels=6, out_channels=4, kernel_size=3, padding=1),
    "strided": dict(in_channels=6, out_channels=4, kernel_size=3, padding=1, stride=2),
    "grouped": dict(
        in_channels=6, out_channels=8, kernel_size=2, dilation=2, groups=2, deform_groups=3
    ),
}


def make(name: str, rank: int, **settings) -> nn.Module:
    torch.manual_seed(3)
    return getattr(layers, name.format(rank))(**settings).double()


def features(rank: int) -> torch.Tensor:
    return torch.randn(2, 6, *(5, 6, 7)[:rank], dtype=torch.float64)


def plain(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The plain convolution of a layer's weight, without its bias."""
    return CONVOLUTION[layer.rank](
        x, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )


@RANKS
@PACKS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fresh_pack_is_a_plain_convolution(rank, name, settings):
    layer, x = make(name, rank, **settings), features(rank)
    scale = 0.5 if "Modulated" in name else 1.0
    torch.testing.assert_close(layer(x), scale * plain(layer, x))


@RANKS
@PACKS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_pack_samples_where_its_branch_says(rank, name, settings):
    layer, x = make(name, rank, **settings), features(rank)
    nn.init.normal_(layer.conv_offset.weight, std=0.3)
    nn.init.normal_(layer.conv_offset.bias)
    samples = settings.get("deform_groups", 1)
    samples *= settings["kernel_size"] ** rank
    predicted = layer.conv_offset(x)
    mask = None
    if "Modulated" in name:
        assert predicted.shape[1] == (rank + 1) * samples
        mask = predicted[:, rank * samples :].sigmoid()
    expected = reference.deform_conv_nd(
        x,
        predicted[:, : rank * samples],
        layer.weight,
        layer.bias,
        layer.stride,
        layer.padding,
        layer.dilation,
        mask,
    )
    torch.testing.assert_close(layer(x), expected)


@RANKS
def test_modulation_scale(rank):
    layer = make("ModulatedDeformConv{}dPack", rank, **SETTINGS["grouped"], modulation_scale=2)
    x = features(rank)
    torch.testing.assert_close(layer(x), plain(layer, x))


@RANKS
@PACKS
def test_autocast_leaves_the_branch_in_float32(rank, name):
    layer = make(name, rank, **SETTINGS["grouped"]).float()
    seen = []
    layer.conv_offset.register_forward_hook(lambda module, _, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(features(rank).float())
    assert (output.dtype, *seen) == (torch.bfloat16, torch.float32)


@RANKS
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_layers_without_a_branch(rank, settings):
    x = features(rank)
    layer = make("ModulatedDeformConv{}d", rank, **settings)
    nn.init.normal_(layer.bias)
    out = plain(layer, x)
    samples = settings.get("deform_groups", 1) * settings["kernel_size"] ** rank
    offset = torch.zeros(2, rank * samples, *out.shape[2:], dtype=x.dtype)
    mask = torch.full((2, samples, *out.shape[2:]), 0.25, dtype=x.dtype)
    bias = layer.bias.view(-1, *[1] * rank)
    torch.testing.assert_close(layer(x, offset, mask), 0.25 * out + bias)
    v1 = make("DeformConv{}d", rank, **settings)
    v1.load_state_dict({"weight": layer.weight}, strict=True)
    torch.testing.assert_close(v1(x, offset), out)


@RANKS
@PACKS
def test_every_parameter_learns(rank, name):
    layer = make(name, rank, **SETTINGS["plain"], bias=True)
    nn.init.normal_(layer.conv_offset.weight, std=0.1)
    layer(features(rank)).square().sum().backward()
    for parameter, value in layer.named_parameters():
        assert torch.count_nonzero(value.grad) > 0, parameter


@RANKS
@PACKS
def test_initialisation_state_and_copies(rank, name):
    """As those over two dimensions: what mmengine initialises anew stays what it is."""
    layer = make(name, rank, **SETTINGS["plain"])
    twin = make(name, 2, **SETTINGS["plain"])
    assert list(layer.state_dict()) == list(twin.state_dict())
    assert layer.conv_offset.weight.dim() == 2 + rank
    nn.init.ones_(layer.conv_offset.weight)
    layer.init_weights()
    assert torch.count_nonzero(layer.conv_offset.weight) == 0
    x = features(rank)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert f"kernel_size={(3,) * rank}" in repr(layer)
    # Old configs' names are of two dimensions only.
    assert "im2col_step" not in inspect.signature(getattr(layers, f"DeformConv{rank}d")).parameters


@RANKS
@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"kernel_size": (3, 3)}, r"kernel_size: expected an int or .*\(3, 3\)"),
        ({"stride": 0}, "stride: .*at least 1, got 0"),
        ({"padding": -1}, "padding: .*at least 0, got -1"),
        ({"groups": 4}, "in_channels: expected a multiple of groups=4, got 6"),
        ({"deform_groups": 4}, "in_channels: expected a multiple of deform_groups=4, got 6"),
    ],
)
def test_bad_arguments(rank, changed, pattern):
    with pytest.raises(ValueError, match=pattern):
        make("DeformConv{}d", rank, **{**SETTINGS["plain"], **changed})


@RANKS
@PACKS
def test_compiles_in_one_graph(rank, name):
    layer, x = make(name, rank, **SETTINGS["plain"]), features(rank)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
