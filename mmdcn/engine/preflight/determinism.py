"""Checks for runs that are to be the same to the bit: layers whose gradients are not, on a GPU."""

from __future__ import annotations

import os

from mmengine.device import get_device
from torch import nn

from .nodes import Problems, some, warn

# Ours whose gradient of the input is added up in no fixed order; torch's setting makes them raise.
_OURS = ("DCNv3", "DCNv4", "DeformRoIPool", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack")
_WORKSPACES = (":4096:8", ":16:8")


def determinism_problems(model: nn.Module) -> Problems:
    """What keeps ``randomness.deterministic=True`` from giving the same bits in every run.

    On the CPU nothing does.
    """
    if get_device() != "cuda":
        return
    place = "randomness.deterministic"
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in _WORKSPACES:
        yield (
            place,
            "on a GPU, products need the environment variable CUBLAS_WORKSPACE_CONFIG=:4096:8 "
            "(or :16:8), set before the program starts",
        )
    raising, varying = [], []
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in _OURS and kind.__module__.startswith("mmdcn."):
            raising.append(f"{name} ({kind.__name__})")
        elif kind.__module__.startswith("mmcv.ops."):
            varying.append(f"{name} ({kind.__name__})")
    if raising:
        yield (
            place,
            f"on a GPU, {some(raising, 4)} have no deterministic gradient and would stop the first "
            "iteration: train on the CPU, or without deterministic=True",
        )
    if varying:
        warn(
            f"{place}: on a GPU, mmcv's kernels do not follow this setting, and add gradients up "
            f"in no fixed order: runs may differ in {some(varying, 4)}.",
        )
