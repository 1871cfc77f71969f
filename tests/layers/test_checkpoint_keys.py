"""Checkpoints whose offset branches have another package's name, or are not there."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmdcn import layers
from mmdcn.layers._checkpoint_keys import absent_branches
from tests.layers.examples import build, inputs

PACKS = [name for name in layers.__all__ if "dPack" in name]
TOOLBOX = [f"plugin.{name}" for name in ("DeformConv2dPack", "ModulatedDeformConv2dPack")]


def make(name: str) -> nn.Module:
    """A layer in a model, of this package or, after ``plugin.``, of the toolbox."""
    layer = build(name.removeprefix("plugin."))
    if name.startswith("plugin."):
        pytest.importorskip("mmcv.ops")
        from mmdcn import plugin

        ours = layer
        cls = getattr(plugin, name.removeprefix("plugin."))
        layer = cls(8, 12, 3, padding=1, groups=2, deform_groups=2)
        layer.load_state_dict(ours.state_dict())
    return nn.Sequential(nn.Identity(), layer)


def elsewhere(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state as the DCNv2 packages write it, without metadata."""
    state = {
        key.replace("conv_offset", "conv_offset_mask"): value.clone()
        for key, value in model.state_dict().items()
    }
    assert "1.conv_offset_mask.weight" in state
    return state


def test_every_layer_with_a_branch_is_here():
    with_branch = [name for name in layers.__all__ if hasattr(build(name), "conv_offset")]
    assert with_branch == PACKS


@pytest.mark.parametrize("name", PACKS + TOOLBOX)
@pytest.mark.parametrize("loader", ["torch", "mmengine"])
@pytest.mark.parametrize("strict", [True, False])
def test_the_name_of_the_dcnv2_packages_loads(name, loader, strict):
    source, target = make(name), make(name)
    target[1].init_offset()
    if loader == "torch":
        target.load_state_dict(elsewhere(source), strict=strict)
    else:
        runner = pytest.importorskip("mmengine").runner
        runner.load_state_dict(target, elsewhere(source), strict=strict)
    assert target[1].conv_offset.weight.any()
    (x,) = inputs(name.removeprefix("plugin."))
    assert torch.equal(target(x), source(x))


def test_a_copy_reads_that_name_too():
    source = make("ModulatedDeformConv2dPack")
    for target in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        target[1].init_offset()
        target.load_state_dict(elsewhere(source))
        assert torch.equal(target[1].conv_offset.weight, source[1].conv_offset.weight)
        assert source[1].conv_offset.weight.any()


def test_a_module_of_that_name_keeps_its_weights():
    class Theirs(layers.ModulatedDeformConv2dPack):
        def __init__(self):
            super().__init__(4, 4, 3)
            self.conv_offset_mask = nn.Conv2d(4, 27, 3)

    source, target = Theirs(), Theirs()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.conv_offset_mask.weight, source.conv_offset_mask.weight)
    assert not target.conv_offset.weight.any()


@pytest.mark.parametrize("name", PACKS)
def test_absent_branches_are_counted(name):
    model = nn.Sequential(build(name), build(name), nn.Identity())
    state = model.state_dict()
    plain = {key: value for key, value in state.items() if "conv_offset" not in key}
    # The plugin counts for itself, where an earlier test installed it.
    load = getattr(nn.Module.load_state_dict, "__wrapped__", nn.Module.load_state_dict)
    half = {key: value for key, value in state.items() if not key.startswith("1.conv_offset")}
    for given, expected in ((state, []), (plain, ["0.", "1."]), (half, ["1."]), ({}, [])):
        with absent_branches() as names:
            load(model, given, strict=False)
        assert names == expected
