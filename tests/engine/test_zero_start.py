"""Offset branches start at zero, whatever mmengine initialises around them."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmdet")

from mmengine.model import BaseModule
from mmengine.registry import MODELS

from mmdcn import layers, plugin
from mmdcn.engine import zero_start
from tests.layers import examples
from tests.models import toolbox_models
from tests.models.toolbox_models import build

pytestmark = pytest.mark.usefixtures("plugin_in_mmdet")


def packs(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "offset_branches")]


def branches(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.{name}": value
        for layer, module in model.named_modules()
        for branch in getattr(module, "offset_branches", ())
        for name, value in module.get_submodule(branch).named_parameters(branch)
    }


def not_at_zero(model: nn.Module) -> list[str]:
    return [name for name, value in branches(model).items() if value.any()]


@pytest.mark.parametrize("name", sorted(toolbox_models.classes()))
def test_every_class_that_takes_a_layer(name):
    if name in toolbox_models.EXCLUDED:
        pytest.skip(toolbox_models.EXCLUDED[name])
    model = build(name, dict(type="DCNv2"))
    assert packs(model)
    model.init_weights()
    assert not_at_zero(model) == []


class Surrounded(BaseModule):
    """Layers out of reach of mmengine's recursion, initialised by their class from without."""

    def __init__(self, *inside: nn.Module, **arguments) -> None:
        super().__init__(**arguments)
        self.inside = nn.ModuleList(inside)


class Above(BaseModule):
    """A module in reach of mmengine's recursion."""

    def __init__(self, child: nn.Module, **arguments) -> None:
        super().__init__(**arguments)
        self.child = child


class InitialisedLast(Surrounded):
    def init_weights(self):
        for child in self.inside:
            child.init_weights()
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                module.weight.data.normal_()
                if module.bias is not None:
                    module.bias.data.normal_()


NORMAL = dict(type="Normal", layer=["Conv1d", "Conv2d", "Conv3d", "Linear"], std=1.0)
WITH_BRANCHES = [n for n in examples.NAMES if hasattr(getattr(layers, n), "offset_branches")]


@pytest.mark.parametrize("name", WITH_BRANCHES)
@pytest.mark.parametrize(
    "around",
    [lambda layer: Surrounded(layer, init_cfg=NORMAL), InitialisedLast],
    ids=["init_cfg", "override"],
)
def test_every_layer(name, around):
    layer = examples.build(name)
    layer.init_weights()
    start = branches(nn.Sequential(layer))
    start = {key: value.clone() for key, value in start.items()}
    model = around(layer)
    model.init_weights()
    for (key, expected), now in zip(start.items(), branches(model).values(), strict=True):
        assert torch.equal(now, expected), key


def test_every_layer_with_a_branch_is_known():
    with_own = {n for n in layers.__all__ if "Pack" in n or n.startswith("DCN")}
    assert with_own == {*WITH_BRANCHES}


def saved(tmp_path, keep) -> str:
    """A checkpoint of an FPN with random branches, of the keys that `keep` keeps."""
    source = build("FPN", dict(type="DCNv2"))
    for value in source.parameters():
        nn.init.normal_(value)
    state = {key: value for key, value in source.state_dict().items() if keep(key)}
    torch.save({"state_dict": state}, tmp_path / "saved.pth")
    return str(tmp_path / "saved.pth")


def test_what_a_checkpoint_fills_is_kept(tmp_path):
    path = saved(tmp_path, lambda key: "conv_offset" not in key or key.startswith("lateral"))
    model = build("FPN", dict(type="DCNv2"))
    model.init_cfg = [model.init_cfg, dict(type="Pretrained", checkpoint=path)]
    Above(model, init_cfg=NORMAL).init_weights()
    state = torch.load(path)["state_dict"]
    filled = [name for name in branches(model) if name in state]
    assert filled and not_at_zero(model) == filled
    assert all(torch.equal(branches(model)[name], state[name]) for name in filled)


def test_what_is_initialised_after_a_checkpoint_starts_at_zero(tmp_path):
    path = saved(tmp_path, lambda key: True)
    model = build("FPN", dict(type="DCNv2"))
    model.init_cfg = dict(type="Pretrained", checkpoint=path)
    above = Above(model)
    above.init_weights()
    assert not_at_zero(model) == [*branches(model)]

    model._is_init = above._is_init = False
    InitialisedLast(above).init_weights()
    assert not_at_zero(model) == []


def test_what_was_there_before_and_is_left_alone_stays():
    model = build("FPN", dict(type="DCN"))
    model.init_weights()
    for value in branches(model).values():
        nn.init.normal_(value)
    trained = {name: value.clone() for name, value in branches(model).items()}
    model.init_weights()  # which mmengine does once only
    Surrounded(model, init_cfg=dict(type="Normal", layer="Linear")).init_weights()
    assert all(torch.equal(value, trained[name]) for name, value in branches(model).items())


def test_offset_convolutions_of_heads_are_theirs():
    head = MODELS.build(
        dict(type="VFNetHead", num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1)
    )
    head.init_weights()
    assert head.vfnet_reg.weight.any()
    head = MODELS.build(dict(type="RepPointsHead", num_classes=3, in_channels=32))
    head.init_weights()
    assert head.reppoints_pts_init_out.weight.any()


def test_an_error_leaves_no_trace():
    class Failing(Surrounded):
        def init_weights(self):
            raise RuntimeError("no weights")

    layer = layers.DeformConv2dPack(4, 4, 3)
    with pytest.raises(RuntimeError, match="no weights"):
        Failing(layer).init_weights()
    assert not layer.conv_offset._load_state_dict_pre_hooks
    model = InitialisedLast(layer)
    model.init_weights()
    assert not_at_zero(model) == []


def test_uninstalling_gives_init_weights_back():
    ours = BaseModule.init_weights
    plugin.uninstall()
    assert not plugin.report().zero_start
    theirs = BaseModule.init_weights
    assert ours.__wrapped__ is theirs
    assert "__init_subclass__" not in vars(BaseModule)
    model = build("FPN", dict(type="mmdcn.DCNv2"))
    model.init_weights()
    assert not_at_zero(model) != []
    plugin.install()
    plugin.install()
    assert BaseModule.init_weights.__wrapped__ is theirs
    assert plugin.report().zero_start
    assert zero_start.installed()
