"""Layers and backbones to try PyTorch's features on."""

import torch
from torch import Tensor, nn

from mmdcn import layers

PACKS = {"DCN": layers.DeformConv2dPack, "DCNv2": layers.ModulatedDeformConv2dPack}


def scatter_samples(model: nn.Module) -> nn.Module:
    """Move the sampling points of a fresh model off its regular grid."""
    for module in model.modules():
        if hasattr(module, "conv_offset"):
            nn.init.normal_(module.conv_offset.weight, std=0.02)
            nn.init.normal_(module.conv_offset.bias)
    return model


def layer(name: str, **settings) -> nn.Module:
    """A small layer, with groups and offset groups."""
    settings = dict(padding=1, groups=2, deform_groups=2) | settings
    return scatter_samples(PACKS[name](8, 12, 3, **settings))


def backbone(name: str | None, *, blocks: int = 6, training: bool = True, **settings) -> nn.Module:
    """mmdet's ResNet-50 as detectors use it, deformable in c3 to c5, and thinner.

    `blocks` of less than 6 leaves out those beyond that number in each stage.
    """
    from mmdet.models.backbones import ResNet

    torch.manual_seed(0)
    if name is not None:
        settings["dcn"] = dict(type=name, deform_groups=1, fallback_on_stride=False)
        settings["stage_with_dcn"] = (False, True, True, True)
    model = ResNet(
        50,
        base_channels=8,
        stem_channels=8,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=True,
        style="pytorch",
        **settings,
    )
    for stage in model.res_layers:
        setattr(model, stage, nn.Sequential(*list(getattr(model, stage))[:blocks]))
    model.train(training)  # which returns nothing in mmdet
    return scatter_samples(model)


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every output, and on each of its elements in its own way."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return sum((o.float().sin() * o.float()).mean() for o in outputs)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of :func:`loss` with respect to all parameters; they are given back cleared."""
    loss(model(x)).backward()
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    """Within `rtol` of the largest element of each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).abs().max()
        assert error <= rtol * value.float().abs().max().clamp(min=1e-6), (name, float(error))
