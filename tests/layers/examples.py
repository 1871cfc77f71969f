"""One small example of each public layer, with inputs: what the contract of layers runs on.

A new layer needs an entry in `build`; tests/layers/test_contract.py fails without it.
"""

import torch
from torch import Tensor, nn

from mmdcn import layers

NAMES = tuple(layers.__all__)
ROIS = torch.tensor([[0, 4.0, 4.0, 40.0, 33.0], [1, 20.0, 10.0, 50.0, 33.0]])


def build(name: str) -> nn.Module:
    """The layer, with sampling points off the regular grid."""
    torch.manual_seed(0)
    cls = getattr(layers, name)
    if name in ("DCNv3", "DCNv4"):
        model = cls(8, 12, 3, padding=1, deform_groups=2)
    elif name == "DeformRoIPool":
        model = cls((2, 3), 0.25, 2, 0.3)
    elif "RoIPool" in name:
        model = cls((2, 3), 8, 16, 0.25, 2, 0.3)
    else:
        model = cls(8, 12, 3, padding=1, groups=2, deform_groups=2)
    for parameter in model.parameters():
        if not parameter.any():  # branches that start at zero
            nn.init.normal_(parameter, std=0.2)
    return model


def rank_of(name: str) -> int:
    """The number of dimensions of its images."""
    return next((rank for rank in (1, 2, 3) if f"Conv{rank}d" in name), 2)


def inputs(name: str, more: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    """What the layer is called with, features first, all but them constant."""
    torch.manual_seed(1)
    rank = rank_of(name)
    size = tuple(n + more for n in (7, 9, 3)[:rank])
    x = torch.randn(batch, 8, *size)
    if "RoIPool" in name:
        offset = (torch.randn(2, 2, 2, 3),) if name == "DeformRoIPool" else ()
        return (x, ROIS, *offset)
    if "Pack" in name or name.startswith("DCN"):
        return (x,)
    samples = 2 * 3**rank
    offset = torch.randn(batch, rank * samples, *size)
    mask = (torch.rand(batch, samples, *size),) if name.startswith("Modulated") else ()
    return (x, offset, *mask)
