"""Checks of a checkpoint against the model that is to take it, without the model's memory."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmdcn.engine.checkpoint import load
from mmdcn.engine.saving import find_latest_checkpoint

from .nodes import Problems, some, warn

_MISFIT = re.compile(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]")
# An offset branch, by its names of all times: in the layer, or beside it.
_BRANCH = re.compile(r"(.+?)(?:\.conv_offset(?:_mask)?|(?<=\d)_offset)\.weight")
# How to go on where a checkpoint is meant to differ.
_ON_PURPOSE = "preflight=dict(checkpoint=False) if that is on purpose"


def checkpoint_problems(
    cfg: Config, model: nn.Module, classes: Sequence[str] | None, is_training: bool
) -> Problems:
    """Where a checkpoint does not fit.

    A model that is tested, or goes on being trained, takes all its weights from it. One that begins
    with it may have other classes, and is told what starts anew.

    Args:
        cfg: whose ``load_from`` names the checkpoint, or its work folder's last one is resumed.
        model: the config's, on the meta device.
        classes: names of those that the data has, where these are known.
        is_training: whether the model is trained.
    """
    path = cfg.get("load_from")
    if path is None and cfg.get("resume") and cfg.get("work_dir"):
        path = find_latest_checkpoint(cfg.work_dir)
    if not isinstance(path, str):
        return
    place = "resume" if is_training and cfg.get("resume") else "load_from"
    fine_tuning = is_training and place == "load_from"
    if fine_tuning and "://" in path:
        return
    checkpoint = _read(path)
    if not isinstance(checkpoint, dict):
        yield place, f"{path!r} holds no weights but a {type(checkpoint).__name__}"
        return
    if place == "resume" and not _has_state_of_training(checkpoint):
        yield (
            place,
            f"{path!r} holds weights, but not how far the training was: to begin a new one with "
            f"them, leave out --resume, and give --cfg-options load_from={path}",
        )
        return
    if classes is not None and not fine_tuning:
        yield from _class_names(path, place, checkpoint, classes)
    fit = _fit(model, checkpoint.get("state_dict", checkpoint))
    if fine_tuning:
        _warn_of_what_is_not_taken(path, fit)
    else:
        yield from _problems_of_all_weights(path, place, fit)


def _warn_of_what_is_not_taken(path: str, fit: _Fit) -> None:
    if fit.misfits:
        warn(
            f"load_from: {len(fit.misfits)} weights of {path!r} have other shapes than the "
            f"model's, which start anew, as for other classes: {'; '.join(fit.misfits[:3])}."
        )
    if fit.plain:
        warn(
            f"load_from: {path!r} is of a deformable model, and {_plain_layers(fit)}: their "
            "offsets are left out. Set dcn and stage_with_dcn of the backbone if that is not meant."
        )


def _problems_of_all_weights(path: str, place: str, fit: _Fit) -> Problems:
    if fit.misfits:
        yield (
            place,
            f"{len(fit.misfits)} weights of {path!r} do not fit the model, such as "
            f"{'; '.join(fit.misfits[:3])}: use the config that it was trained with, or "
            f"{_ON_PURPOSE}",
        )
    if fit.missing:
        yield (
            place,
            f"{path!r} lacks {len(fit.missing)} weights of the model, such as "
            f"{some(fit.missing, 3)}: use the config that it was trained with, or {_ON_PURPOSE}",
        )
    if fit.plain:
        yield (
            place,
            f"{path!r} is of a deformable model, and {_plain_layers(fit)}: use the config that it "
            f"was trained with, with its dcn and stage_with_dcn, or {_ON_PURPOSE}",
        )


def _plain_layers(fit: _Fit) -> str:
    number = len(fit.plain)
    layers = "1 of its layers is" if number == 1 else f"{number} of its layers are"
    return f"{layers} plain in this one ({some(fit.plain, 3)})"


def _has_state_of_training(checkpoint: dict) -> bool:
    meta = checkpoint.get("meta")
    return isinstance(meta, dict) and {"epoch", "iter"} <= meta.keys()


def _read(path: str) -> Any:
    if "://" in path:
        return CheckpointLoader.load_checkpoint(path, map_location="cpu")
    return load(os.path.expanduser(path), map_location="cpu", mmap=True)


def _class_names(path: str, place: str, checkpoint: dict, classes: Sequence[str]) -> Problems:
    """Where a checkpoint says that it was trained on other classes."""
    trained_on = trained_classes(checkpoint)
    if not isinstance(trained_on, (list, tuple)) or set(trained_on) == set(classes):
        return
    yield (
        place,
        f"{path!r} was trained on {len(trained_on)} classes, {some(list(trained_on), 4)}, and the "
        f"data has {len(classes)}, {some(list(classes), 4)}: set "
        "preflight=dict(class_counts=False) if they differ on purpose",
    )


def trained_classes(checkpoint: Any) -> Any:
    """The names of the classes that a checkpoint says it was trained on, or None."""
    meta = (checkpoint.get("meta") if isinstance(checkpoint, dict) else None) or {}
    return (meta.get("dataset_meta") or {}).get("classes", meta.get("CLASSES"))


def names_classes(path: str) -> bool:
    """Whether a checkpoint, a file or an address, says on which classes it was trained."""
    return trained_classes(_read(path)) is not None


@dataclass(frozen=True)
class _Fit:
    """How a checkpoint fits a model.

    Attributes:
        misfits: weights of other shapes, with both.
        missing: parameters of the model that it lacks.
        plain: layers of the model that are plain, and for which it has an offset branch.
    """

    misfits: list[str]
    missing: list[str]
    plain: list[str]


def _fit(model: nn.Module, weights: dict) -> _Fit:
    weights = {
        re.sub(r"^module\.", "", name): value.to("meta") if isinstance(value, Tensor) else value
        for name, value in weights.items()
    }
    names = set(model.state_dict())
    branches = [match[1] for match in map(_BRANCH.fullmatch, weights) if match]
    plain = [
        layer
        for layer in branches
        if f"{layer}.weight" in names and f"{layer}.conv_offset.weight" not in names
    ]
    # torch says of each weight that nothing is copied to this device.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            missing = model.load_state_dict(weights, strict=False).missing_keys
        except RuntimeError as error:
            found = _MISFIT.findall(str(error))
            if not found:
                # Some layers compute with what they load, as DetectoRS's do: that has no values.
                found, missing = _compared(model, weights)
            if found:
                return _Fit([f"{name}: ({a}) for ({b})" for name, a, b in found], [], plain)
    # Offset branches start at zero where a plain model's checkpoint has none, as they should.
    parameters = {name for name, _ in model.named_parameters()}
    lacking = [name for name in missing if name in parameters and "offset" not in name]
    return _Fit([], lacking, plain)


def _compared(model: nn.Module, weights: dict) -> tuple[list[tuple[str, str, str]], list[str]]:
    """The weights of other shapes, with both, and the names of those that are missing."""

    def shape(value: Any) -> str:
        return ", ".join(map(str, getattr(value, "shape", ())))

    own = model.state_dict()
    shapes = [(name, shape(weights[name]), shape(own[name])) for name in own if name in weights]
    return [one for one in shapes if one[1] != one[2]], [n for n in own if n not in weights]
