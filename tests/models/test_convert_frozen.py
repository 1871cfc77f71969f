"""Frozen models that are converted: what was frozen stays so, and the offset branches learn."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mmdcn import layers
from mmdcn.models import convert_to_deformable
from tests.models.converted import converted

V2 = dict(type=layers.ModulatedDeformConv2dPack)


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    return model.requires_grad_(False)


def trainable(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def test_the_branch_of_a_frozen_convolution_learns():
    model = convert_to_deformable(frozen(), V2, "2").train()
    assert trainable(model) == ["2.conv_offset.weight", "2.conv_offset.bias"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 9, 9)).square().mean().backward()
    optimizer.step()
    assert model[2].conv_offset.weight.any()


def test_told_otherwise_it_is_frozen():
    assert trainable(convert_to_deformable(frozen(), V2, "2", train_offsets=False)) == []
    model = frozen()
    model[2].requires_grad_(True)
    convert_to_deformable(model, V2, "[02]", train_offsets=False)
    assert {name.partition(".")[0] for name in trainable(model)} == {"2"}
    assert "2.conv_offset.bias" in trainable(model)


class FreezesItself(nn.Sequential):
    """Frozen whenever its mode is set, as mmdet's backbones are by ``frozen_stages``."""

    def train(self, mode=True):
        super().train(mode)
        self.requires_grad_(False)
        return self


@pytest.mark.parametrize(
    "duplicate",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "deepcopy", "pickle"],
)
def test_what_freezes_itself_freezes_what_it_had(duplicate):
    model = nn.Sequential(FreezesItself(*frozen()), nn.Conv2d(4, 4, 1))
    convert_to_deformable(model, V2, "0.2")
    convert_to_deformable(model, V2, "0.0")
    model = duplicate(model)
    for switch in (model.train, model.eval, model[0].train, model[0].eval):
        assert switch() in (model, model[0])
        branches = {name for name in trainable(model[0]) if "conv_offset" in name}
        assert len(branches) == 4
        assert {*trainable(model[0])} == branches
    assert not model[0].training

    # What the user freezes stays frozen.
    model[0][0].conv_offset.requires_grad_(False)
    model.train()
    assert {*trainable(model[0])} == {"2.conv_offset.weight", "2.conv_offset.bias"}


# A backbone that takes frozen_stages, and which of its convolutions are chosen.
BACKBONES = {
    "ResNet": (dict(depth=50, base_channels=8, frozen_stages=4), "layer[1-4].*.conv2"),
    "ResNeXt": (dict(depth=50, base_channels=8, groups=2, frozen_stages=4), "layer[1-4].*.conv2"),
    "RegNet": (
        dict(
            arch=dict(w0=8, wa=8.0, wm=2.0, group_w=8, depth=8, bot_mul=1.0),
            stem_channels=8,
            frozen_stages=4,
        ),
        "layer[34].*.conv2",
    ),
    "MobileNetV2": (dict(widen_factor=0.25, frozen_stages=7), "layer[34].*.linear_conv.conv"),
    "CSPDarknet": (
        dict(widen_factor=0.125, deepen_factor=0.34, frozen_stages=4),
        "stage[34].0.conv",
    ),
    "CSPNeXt": (
        dict(widen_factor=0.125, deepen_factor=0.34, frozen_stages=4),
        "stage[34].0.conv",
    ),
    "SwinTransformer": (
        dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), frozen_stages=4),
        "patch_embed.projection",
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_stages(name):
    """A backbone that freezes all that it had: what it trains is what the conversion added."""
    registry = pytest.importorskip("mmdet.registry").MODELS
    arguments, select = BACKBONES[name]
    plain = registry.build(dict(type=f"mmdet.{name}", **arguments))
    plain.train()
    model = registry.build(
        dict(
            type="mmdcn.Deformable",
            model_type=f"mmdet.{name}",
            convert=dict(dcn=dict(type="DCNv2"), select=select),
            **arguments,
        )
    )
    nn.Sequential(model).train()  # as a part of a detector
    branches = {
        f"{layer}.conv_offset.{kind}" for layer in converted(model) for kind in ("weight", "bias")
    }
    assert branches
    assert {*trainable(model)} == {*trainable(plain)} | branches
    assert len(trainable(plain)) < len([*plain.parameters()])
