"""The RoI pooling layers by themselves, and against mmcv's layers of the same name."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmdcn import layers
from mmdcn.ops import deform_roi_pool

PACKS = ("DeformRoIPoolPack", "ModulatedDeformRoIPoolPack")
NAMES = ("DeformRoIPool", *PACKS)
ROIS = torch.tensor(
    [[0, 4.0, 4.0, 40.0, 60.0], [1, 20.0, 10.0, 50.0, 33.0], [0, -9.0, 30.0, 20.0, 80.0]]
)


def make(name: str, library=layers, **settings) -> nn.Module:
    good = dict(output_size=(3, 4), spatial_scale=0.25, sampling_ratio=2, gamma=0.3)
    if name != "DeformRoIPool":
        good |= dict(output_channels=5, deform_fc_channels=16)
    return getattr(library, name)(**(good | settings))


def randomize(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)


@pytest.mark.parametrize("name", NAMES)
def test_same_initial_state_as_mmcv(name):
    theirs = pytest.importorskip("mmcv.ops.deform_roi_pool")
    made = []
    for library in (layers, theirs):
        torch.manual_seed(3)
        made.append(make(name, library))
    assert list(made[0].state_dict()) == list(made[1].state_dict())
    for key, value in made[1].state_dict().items():
        assert torch.equal(made[0].state_dict()[key], value), key
    for source, target in (made, made[::-1]):
        randomize(source)
        target.load_state_dict(source.state_dict(), strict=True)
    for key in ("output_size", "spatial_scale", "sampling_ratio", "gamma"):
        assert getattr(made[0], key) == getattr(made[1], key)


@pytest.mark.parametrize(("name", "scale"), [(PACKS[0], 1.0), (PACKS[1], 0.5)])
def test_a_fresh_layer_is_roi_align(name, scale):
    x = torch.randn(2, 5, 15, 20)
    regular = deform_roi_pool(x, ROIS, None, (3, 4), 0.25, 2)
    torch.testing.assert_close(make(name)(x, ROIS), scale * regular)


@pytest.mark.parametrize("name", PACKS)
def test_offsets_and_modulation_come_from_the_regular_pooling(name):
    layer = make(name).double()
    randomize(layer)
    x, rois = torch.randn(2, 5, 15, 20).double(), ROIS.double()
    seen = deform_roi_pool(x, rois, None, (3, 4), 0.25, 2).flatten(1)
    offset = layer.offset_fc(seen).view(3, 2, 3, 4)
    expected = deform_roi_pool(x, rois, offset, (3, 4), 0.25, 2, 0.3)
    if name == PACKS[1]:
        expected = expected * layer.mask_fc(seen).view(3, 1, 3, 4)
    torch.testing.assert_close(layer(x, rois), expected)
    layer(x, rois).sum().backward()
    assert all(p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_position_sensitive(name):
    layer = make(name, position_sensitive=True)
    randomize(layer)
    x = torch.randn(2, 5 * 12, 15, 20, requires_grad=True)
    output = layer(x, ROIS)
    assert output.shape == (3, 5, 3, 4)
    output.sum().backward()
    assert x.grad.shape == x.shape


def test_caller_may_give_offsets():
    layer = make("DeformRoIPool")
    x, offset = torch.randn(2, 6, 15, 20), torch.randn(3, 4, 3, 4)
    expected = deform_roi_pool(x, ROIS, offset, (3, 4), 0.25, 2, 0.3)
    assert torch.equal(layer(x, ROIS, offset), expected)
    assert not torch.equal(layer(x, ROIS), expected)


@pytest.mark.parametrize("name", PACKS)
def test_init_weights_makes_it_fresh(name):
    layer = make(name)
    randomize(layer)
    layer.init_weights()
    assert not any(p.any() for p in layer.offset_fc[-1].parameters())
    assert layer.offset_fc[0].weight.all()
    if name == PACKS[1]:
        assert not any(p.any() for p in layer.mask_fc[2].parameters())


@pytest.mark.parametrize("name", NAMES)
def test_no_rois(name):
    layer = make(name)
    x = torch.randn(2, 5, 15, 20, requires_grad=True)
    output = layer(x, ROIS[:0])
    output.sum().backward()
    assert output.shape == (0, 5, 3, 4)
    assert torch.count_nonzero(x.grad) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKS)
def test_autocast(name, dtype):
    """Features of either kind; what the branch predicts is in half precision."""
    layer = make(name)
    randomize(layer)
    x = torch.randn(2, 5, 15, 20, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, ROIS)
    output.float().sum().backward()
    assert x.grad.dtype == dtype
    assert layer.offset_fc[0].weight.grad.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", PACKS)
def test_copies_compute_the_same(name, duplicate):
    layer = make(name)
    randomize(layer)
    x = torch.randn(2, 5, 15, 20)
    assert torch.equal(duplicate(layer)(x, ROIS), layer(x, ROIS))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(output_size=0), "output_size: .* at least 1, got 0"),
        (dict(output_size=(7, 7, 7)), "output_size: expected an int or a pair"),
        (dict(spatial_scale=0), "spatial_scale: expected a positive number, got 0"),
        (dict(output_channels=0), "output_channels: .* got 0"),
        (dict(deform_fc_channels=1.5), "deform_fc_channels: .* got 1.5"),
    ],
)
def test_bad_arguments(name, arguments, message):
    if name == "DeformRoIPool" and not {*arguments} <= {"output_size", "spatial_scale"}:
        pytest.skip("not an argument of this layer")
    with pytest.raises(ValueError, match=message):
        make(name, **arguments)


@pytest.mark.parametrize("name", PACKS)
def test_input_of_other_channels_is_refused(name):
    with pytest.raises(ValueError, match=r"input: .* 5 in the output.* got 6 .*\(2, 6, 15, 20\)"):
        make(name)(torch.randn(2, 6, 15, 20), ROIS)


def test_representation_names_what_matters():
    text = repr(make("ModulatedDeformRoIPoolPack"))
    assert "output_size=(3, 4), spatial_scale=0.25, sampling_ratio=2, gamma=0.3" in text
    assert "(mask_fc): Sequential(" in text
