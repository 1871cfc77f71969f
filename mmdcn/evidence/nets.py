"""The arms: networks for digits that differ in one thing, plain, deformable and controls.

The plain network has five 3 × 3 convolutions, each followed by a normalisation and ReLU, a mean
over all positions and a linear layer. Its last features see 39 pixels, more than the 32 of the
largest digit at strength 1. In deformable arms all convolutions but the first are deformable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdcn.layers import DCNv4, ModulatedDeformConv2d
from mmdcn.models import convert_to_deformable

WIDTHS = (24, 48, 48, 96, 96)
STRIDES = (2, 2, 1, 2, 1)
CLASSES = 10
# Widths that match the parameters of the DCNv2 arm, and the time of its training iteration.
WIDTHS_OF_SAME_SIZE = (28, 56, 56, 111, 111)
WIDTHS_OF_SAME_TIME = (34, 68, 68, 136, 136)
OFFSET_GROUPS = 4

Widths = Sequence[int]


class DigitNet(nn.Module):
    """The plain network.

    Args:
        widths: output channels of the convolutions.
        dilation: of all convolutions but the first.
    """

    def __init__(self, widths: Widths = WIDTHS, dilation: int = 1) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        channels = 1
        for number, (width, stride) in enumerate(zip(widths, STRIDES)):
            reach = dilation if number else 1
            conv = nn.Conv2d(channels, width, 3, stride, reach, reach, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.convs.append(conv)
            self.norms.append(nn.BatchNorm2d(width))
            channels = width
        self.classifier = nn.Linear(channels, CLASSES)

    def features(self, x: Tensor) -> list[Tensor]:
        """The maps after each of the five stages, for `x` of (N, 1, 40, 40)."""
        maps = []
        for conv, norm in zip(self.convs, self.norms):
            x = F.relu(norm(conv(x)), inplace=True)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        """Scores (N, 10) of `x`, (N, 1, 40, 40)."""
        return self.classifier(self.features(x)[-1].mean(dim=(2, 3)))


class SpatialTransformer(nn.Module):
    """A spatial transformer (arXiv 1506.02025) before a network: one affine map for each image.

    The map goes from output to input, and is the identity at first.
    """

    def __init__(self, network: DigitNet, widths: Widths = (20, 36, 36, 48)) -> None:
        super().__init__()
        self.network = network
        layers: list[nn.Module] = []
        channels = 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU(inplace=True))
            channels = width
        self.localisation = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * 9, 32), nn.ReLU(inplace=True)
        )
        self.affine = nn.Linear(32, 6)
        nn.init.zeros_(self.affine.weight)
        with torch.no_grad():
            self.affine.bias.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))

    def straighten(self, x: Tensor) -> Tensor:
        """What the network is given of `x`."""
        matrix = self.affine(self.localisation(x)).view(-1, 2, 3)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.straighten(x))


class ModulationOnly(nn.Module):
    """DCNv2 whose points stay: a 3 × 3 convolution with a learned modulation of each sample."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        arguments = (conv.kernel_size, conv.stride, conv.padding)
        self.conv = ModulatedDeformConv2d(
            conv.in_channels, conv.out_channels, *arguments, bias=False
        )
        self.conv.weight = conv.weight
        self.branch = nn.Conv2d(conv.in_channels, 9, *arguments)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        modulation = 2 * self.branch(x).sigmoid()
        count, _, height, width = modulation.shape
        return self.conv(x, x.new_zeros(count, 18, height, width), modulation)


class PlainBranch(nn.Module):
    """A convolution and, added to it, a small network of as many parameters as DCNv2's branch.

    It starts at zero, as offset branches do, and moves no points.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        channels, outputs = conv.in_channels, conv.out_channels
        hidden = round(27 * (9 * channels + 1) / (9 * channels + 1 + outputs))
        self.conv = conv
        self.branch = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, conv.stride, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
        )
        nn.init.zeros_(self.branch[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.branch(x)


def _deformable(**dcn: object) -> Callable[[DigitNet], nn.Module]:
    def convert(network: DigitNet) -> nn.Module:
        return convert_to_deformable(network, dcn=dcn, select="convs.[1234]")

    return convert


def each_convolution(
    layer: Callable[[nn.Conv2d], nn.Module],
) -> Callable[[DigitNet], nn.Module]:
    """A conversion that puts a layer into the place of each convolution but the first."""

    def convert(network: DigitNet) -> nn.Module:
        for number in range(1, len(STRIDES)):
            network.convs[number] = layer(network.convs[number])
        return network

    return convert


def _dcnv4(conv: nn.Conv2d) -> nn.Module:
    arguments = (conv.kernel_size, conv.stride, conv.padding)
    return DCNv4(
        conv.in_channels, conv.out_channels, *arguments, deform_groups=OFFSET_GROUPS, bias=False
    )


def _as_it_is(network: DigitNet) -> nn.Module:
    return network


@dataclass(frozen=True)
class Arm:
    """A network that is compared with others.

    Args:
        title: what tables call it.
        convert: what is done to a plain network.
        widths: of that plain network.
        dilation: of that plain network.
        added: how the names of the parameters begin or end that a frozen network learns.
    """

    title: str
    convert: Callable[[DigitNet], nn.Module] = _as_it_is
    widths: Widths = WIDTHS
    dilation: int = 1
    added: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The network; torch's generator decides its weights, which arms of one width share."""
        return self.convert(DigitNet(self.widths, self.dilation))


ARMS = {
    "plain": Arm("plain"),
    "plain-size": Arm("plain, parameters of DCNv2", widths=WIDTHS_OF_SAME_SIZE),
    "plain-time": Arm("plain, time of DCNv2", widths=WIDTHS_OF_SAME_TIME),
    "dilated": Arm("plain, dilation 2", dilation=2),
    "transformer": Arm("spatial transformer", SpatialTransformer, added=("localisation", "affine")),
    "modulation": Arm("modulation only", each_convolution(ModulationOnly)),
    "dcn": Arm("DCN", _deformable(type="DCN"), added=("conv_offset",)),
    "dcnv2": Arm("DCNv2", _deformable(type="DCNv2"), added=("conv_offset",)),
    "dcnv2-groups": Arm(
        "DCNv2, 4 offset groups", _deformable(type="DCNv2", deform_groups=OFFSET_GROUPS)
    ),
    "dcnv4": Arm("DCNv4", each_convolution(_dcnv4)),
    "branch": Arm("plain branch of equal size", each_convolution(PlainBranch), added=("branch",)),
    "norm": Arm("norm statistics only"),
}


def is_added(arm: Arm, name: str) -> bool:
    """Whether a parameter is one that an arm adds to the plain network."""
    return any(part in name.split(".") for part in arm.added)


def is_offset(name: str) -> bool:
    """Whether a parameter decides where samples are taken: it then learns more slowly."""
    return any(part in name.split(".") for part in ("conv_offset", "offset_mask", "affine"))
