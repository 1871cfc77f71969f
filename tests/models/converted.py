"""What the tests of converted models share: inputs, and looks at a model and at its output."""

import torch
from torch import nn

from mmdcn import layers

PACKS = layers.DeformConv2dPack | layers.ModulatedDeformConv2dPack


def image():
    return torch.randn(2, 3, 64, 96)


def levels():
    return [torch.randn(2, 16, size, size + 4) for size in (16, 8)]


def tensors(nested) -> list[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        return [nested]
    return [tensor for item in nested for tensor in tensors(item)]


def assert_same_output(model, expected, x):
    for mine, theirs in zip(tensors(model(x)), tensors(expected(x)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def converted(model) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PACKS)}
