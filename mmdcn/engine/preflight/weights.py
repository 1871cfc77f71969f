"""Checks of a checkpoint against the model that is to take it, without the model's memory."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmdcn.engine.checkpoint import load
from mmdcn.engine.saving import find_latest_checkpoint
from mmdcn.errors import first_line

from .nodes import Problems, some, warn

_MISFIT = re.compile(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]")
# How to go on where a checkpoint is meant to differ.
_ON_PURPOSE = "preflight=dict(checkpoint=False) if that is on purpose"


def build_without_memory(cfg: Config) -> nn.Module | None:
    """The model of a config on the meta device; None where it cannot be built."""
    from mmdet.registry import MODELS

    try:
        with torch.device("meta"):
            return MODELS.build(copy.deepcopy(cfg.model))
    except Exception as error:
        # What is wrong with a model that cannot be built anywhere, the toolbox says.
        if "meta" not in str(error):
            return None
    # Some compute with values while they are built, such as the rates of Swin's paths.
    try:
        return MODELS.build(copy.deepcopy(cfg.model)).to("meta")
    except Exception:
        return None


def checkpoint_problems(cfg: Config, classes: Sequence[str] | None, is_training: bool) -> Problems:
    """Where a checkpoint does not fit.

    A model that is tested, or goes on being trained, takes all its weights from it. One that begins
    with it may have other classes, and is told what starts anew.

    Args:
        cfg: whose ``load_from`` names the checkpoint, or its work folder's last one is resumed.
        classes: names of those that the data has, where these are known.
        is_training: whether the model is trained.
    """
    path = cfg.get("load_from")
    if path is None and cfg.get("resume") and cfg.get("work_dir"):
        path = find_latest_checkpoint(cfg.work_dir)
    if not isinstance(path, str):
        return
    fine_tuning = is_training and not cfg.get("resume")
    if fine_tuning and "://" in path:
        return
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        yield "load_from", f"{path!r} holds no weights but a {type(checkpoint).__name__}"
        return
    if classes is not None and not fine_tuning:
        yield from _class_names(path, checkpoint, classes)
    weights = checkpoint.get("state_dict", checkpoint)
    misfits, missing = _unfilled(cfg, weights)
    if fine_tuning:
        if misfits:
            warn(
                f"load_from: {len(misfits)} weights of {path!r} have other shapes than the "
                f"model's, which start anew, as for other classes: {'; '.join(misfits[:3])}.",
            )
        return
    if misfits:
        yield (
            "load_from",
            f"{len(misfits)} weights of {path!r} do not fit the model, such as "
            f"{'; '.join(misfits[:3])}: use the config that it was trained with, or {_ON_PURPOSE}",
        )
    if missing:
        yield (
            "load_from",
            f"{path!r} lacks {len(missing)} weights of the model, such as {some(missing, 3)}: use "
            f"the config that it was trained with, or {_ON_PURPOSE}",
        )


def _read(path: str) -> Any:
    if "://" in path:
        return CheckpointLoader.load_checkpoint(path, map_location="cpu")
    return load(os.path.expanduser(path), map_location="cpu", mmap=True)


def _class_names(path: str, checkpoint: dict, classes: Sequence[str]) -> Problems:
    """Where a checkpoint says that it was trained on other classes."""
    meta = checkpoint.get("meta") or {}
    trained_on = (meta.get("dataset_meta") or {}).get("classes", meta.get("CLASSES"))
    if not isinstance(trained_on, (list, tuple)) or set(trained_on) == set(classes):
        return
    yield (
        "load_from",
        f"{path!r} was trained on {len(trained_on)} classes, {some(list(trained_on), 4)}, and the "
        f"data has {len(classes)}, {some(list(classes), 4)}: set "
        "preflight=dict(class_counts=False) if they differ on purpose",
    )


def _unfilled(cfg: Config, weights: dict) -> tuple[list[str], list[str]]:
    """Weights that do not fit the model, and parameters of it that none fills."""
    model = build_without_memory(cfg)
    if model is None:
        return [], []
    weights = {
        re.sub(r"^module\.", "", name): value.to("meta") if isinstance(value, Tensor) else value
        for name, value in weights.items()
    }
    misfits = []
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:
        found = _MISFIT.findall(str(error))
        misfits = [f"{name}: ({a}) for ({b})" for name, a, b in found] or [first_line(error)]
        missing = []
    # Offset branches start at zero where a plain model's checkpoint has none, as they should.
    parameters = {name for name, _ in model.named_parameters()}
    return misfits, [name for name in missing if name in parameters and "offset" not in name]
