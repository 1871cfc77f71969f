"""`max_offset=`: the bound, what it leaves alone, and a way back for offsets that ran away."""

import pickle

import pytest
import torch
from torch import nn

from mmdcn import layers
from mmdcn.engine.sampled_calls import named_calls
from tests.layers.examples import build, inputs

BRANCHES = {"DCNv3": "offset", "DCNv4": "offset_mask"}
NAMES = [n for n in layers.__all__ if n.endswith("dPack") or n in BRANCHES]
EVERY = pytest.mark.parametrize("name", NAMES)


def make(name: str, max_offset: float | None, **options) -> nn.Module:
    """The example of this layer with a bound, and with its weights."""
    example = build(name)
    if name in BRANCHES:
        layer = getattr(layers, name)(
            8, 12, 3, padding=1, deform_groups=2, max_offset=max_offset, **options
        )
    else:
        layer = getattr(layers, name)(
            8, 12, 3, padding=1, groups=2, deform_groups=2, max_offset=max_offset
        )
    assert list(layer.state_dict()) == list(example.state_dict())
    layer.load_state_dict(example.state_dict())
    return layer


def moved(layer: nn.Module, name: str) -> torch.Tensor:
    """By how much each coordinate of each sample is moved."""
    calls = []
    with named_calls(layer, lambda *call: calls.append(call[-1]())), torch.no_grad():
        layer(*inputs(name))
    (call,) = calls
    return call.locations - call.regular


def branch_of(layer: nn.Module, name: str) -> nn.Module:
    return layer.get_submodule(BRANCHES.get(name, "conv_offset"))


def test_every_layer_with_a_branch_has_it():
    assert len(NAMES) == 8


@EVERY
def test_none_changes_nothing(name):
    assert torch.equal(make(name, None)(*inputs(name)), build(name)(*inputs(name)))
    assert "max_offset" not in repr(make(name, None))


@EVERY
def test_offsets_stay_within_it_and_small_ones_nearly_as_they_are(name):
    free = moved(build(name), name)
    assert free.abs().max() > 1
    close = moved(make(name, 0.5), name)
    assert 0.25 < close.abs().max() < 0.5 * (1 + 1e-5)
    assert (close.sign() == free.sign())[free.abs() > 1e-3].all()
    torch.testing.assert_close(moved(make(name, 1e4), name), free, rtol=1e-3, atol=1e-4)
    assert "max_offset=0.5" in repr(make(name, 0.5))


@pytest.mark.parametrize("scale", [0.5, 4.0, -2.0])
@pytest.mark.parametrize("name", BRANCHES)
def test_the_bound_is_in_pixels_whatever_the_scale(name, scale):
    layer = make(name, 1.5, offset_scale=scale)
    nn.init.constant_(branch_of(layer, name).bias, 1e4)
    furthest = moved(layer, name).abs().max()
    torch.testing.assert_close(furthest, torch.tensor(1.5), rtol=1e-3, atol=0)


@EVERY
def test_offsets_that_ran_away_have_a_gradient(name):
    """Without a bound output and gradients are zero at this bias, apart from biases."""
    gradients = []
    for max_offset in (None, 2.0):
        layer = make(name, max_offset)
        branch = branch_of(layer, name)
        with torch.no_grad():
            branch.weight.zero_()
            branch.bias.fill_(1e4)
            if name == "DCNv4":  # the modulations
                branch.bias[:54].view(2, 27)[:, 18:] = 0.1
        samples = {"DCNv4": 54, "DCNv3": 36}.get(name)
        layer(*inputs(name)).square().sum().backward()
        gradient = branch.bias.grad[:samples]
        if name == "DCNv4":
            gradient = gradient.view(2, 27)[:, :18]
        elif name.startswith("Modulated"):
            gradient = gradient[
                : -len(gradient) // (2 if "1d" in name else 3 if "2d" in name else 4)
            ]
        gradients.append(gradient)
    assert not gradients[0].any()
    assert gradients[1].any()
    assert gradients[1].isfinite().all()


@EVERY
def test_it_is_kept_in_copies_and_new_in_old_ones(name):
    layer = make(name, 0.5)
    copied = pickle.loads(pickle.dumps(layer))
    assert torch.equal(copied(*inputs(name)), layer(*inputs(name)))
    del layer.max_offset  # as in one that was pickled before
    assert torch.equal(layer(*inputs(name)), build(name)(*inputs(name)))


@EVERY
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "8", True])
def test_what_is_no_bound_is_refused(name, value):
    with pytest.raises(ValueError, match="max_offset: expected None or a number of pixels above 0"):
        getattr(layers, name)(8, 8, 3, max_offset=value)
