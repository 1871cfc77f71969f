"""Random weights of detectors with which the deformable layers do what they do after training."""

import torch
from torch import nn


def spread_offsets(model: nn.Module, offset_std: float) -> None:
    """Give the sampling points of all deformable layers a spread, and blocks a result.

    Each block of a fresh ResNet is the identity, and each fresh kernel samples its grid: what the
    deformable layers compute would not matter.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "conv_offset" in name and name.endswith(".bias"):
                parameter.normal_(0, offset_std)
            elif parameter.dim() == 1 and name.endswith(".weight") and not parameter.any():
                parameter.fill_(0.2)
