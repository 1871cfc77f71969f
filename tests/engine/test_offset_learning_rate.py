"""`dcn_offset_lr_mult` for every layer."""

import pytest
from torch import nn

pytest.importorskip("mmcv.ops")

from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper

from mmdcn import layers, plugin
from tests.layers.examples import build

BRANCHES = {"DCNv3": "offset", "DCNv4": "offset_mask"}
NAMES = [n for n in layers.__all__ if n.endswith("dPack") or n in BRANCHES]
NAMES += ["plugin.DeformConv2dPack", "plugin.ModulatedDeformConv2dPack"]


@pytest.fixture(autouse=True)
def installed():
    plugin.install()


def rates(model: nn.Module, **paramwise) -> dict[str, float]:
    """The learning rate of each parameter, by its name."""
    optim_wrapper = build_optim_wrapper(
        model, dict(optimizer=dict(type="SGD", lr=1.0), paramwise_cfg=paramwise)
    )
    by_parameter = {
        parameter: group["lr"]
        for group in optim_wrapper.optimizer.param_groups
        for parameter in group["params"]
    }
    named = dict(model.named_parameters())
    assert len(by_parameter) == len(named)
    return {name: by_parameter[parameter] for name, parameter in named.items()}


def model(name: str) -> nn.Module:
    if name.startswith("plugin."):
        layer = getattr(plugin, name.removeprefix("plugin."))(8, 12, 3)
    else:
        layer = build(name)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ModuleDict({"layer": layer}))


def branch(name: str) -> str:
    return f"1.layer.{BRANCHES.get(name, 'conv_offset')}."


@pytest.mark.parametrize("name", NAMES)
def test_it_is_that_of_offset_branches_alone(name):
    found = rates(model(name), dcn_offset_lr_mult=0.1)
    assert {n for n, rate in found.items() if rate == 0.1} == {
        branch(name) + kind for kind in ("weight", "bias")
    }
    assert set(found.values()) == {0.1, 1.0}
    # A layer by itself has no name in front of its branch.
    alone = rates(model(name)[1]["layer"], dcn_offset_lr_mult=0.1)
    assert set(alone.values()) == {0.1, 1.0}


@pytest.mark.parametrize("name", NAMES)
def test_other_settings_work_as_ever(name):
    assert set(rates(model(name)).values()) == {1.0}
    custom = rates(
        model(name), dcn_offset_lr_mult=0.1, custom_keys={branch(name): dict(lr_mult=0.3)}
    )
    assert set(custom.values()) == {0.3, 1.0}
    biases = rates(model(name), dcn_offset_lr_mult=0.1, bias_lr_mult=2.0)
    assert biases[branch(name) + "bias"] == 0.1
    assert biases["0.bias"] == 2.0


def test_it_is_given_back():
    plugin.uninstall()
    try:
        assert DefaultOptimWrapperConstructor.add_params.__module__.startswith("mmengine.")
        assert set(rates(model("DCNv3"), dcn_offset_lr_mult=0.1).values()) == {1.0}
    finally:
        plugin.install()
