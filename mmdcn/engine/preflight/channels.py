"""Checks of what a model's parts hand to each other: channels, and how many feature maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .building import silence
from .nodes import Problems

_SIZE = 256  # of an image, which every backbone can halve often enough


def channel_problems(model: nn.Module, node: Mapping) -> Problems:
    """A neck, or a dense head, that cannot take the feature maps of what is before it.

    Args:
        model: on the meta device, where nothing is computed. It is in evaluation mode afterwards.
        node: its config.
    """
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    backbone, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if backbone is None:
        return
    model.eval()
    features, _ = _run(backbone, torch.empty(1, 3, _SIZE, _SIZE, device="meta"))
    if not _are_maps(features):
        return  # it takes something else, or needs values
    before = "backbone"
    if neck is not None:
        found, fits = _run(neck, features)
        if not fits:
            yield "model.neck", _said(neck, features, before)
        if not _are_maps(found):
            return
        features, before = found, "neck"
    for name in ("rpn_head", "bbox_head"):
        head = getattr(model, name, None)
        if isinstance(head, BaseDenseHead) and not _run(head, features)[1]:
            # mmdet's RPN calls its rpn_head bbox_head.
            yield f"model.{name if name in node else 'rpn_head'}", _said(head, features, before)


def _run(module: nn.Module, given: Any) -> tuple[Any, bool]:
    """What a module makes of features, None where that is not found out, and whether they fit."""
    try:
        with torch.no_grad(), silence():
            return module(given), True
    except AssertionError:
        # The toolbox's necks assert that there are as many maps as in_channels has numbers.
        counts = getattr(module, "in_channels", None)
        return None, not isinstance(counts, Sequence) or len(counts) == len(given)
    except (RuntimeError, ValueError) as error:
        return None, "channel" not in str(error)
    except Exception:
        return None, True  # of arguments that are no features, or of values, which are not there


def _are_maps(features: Any) -> bool:
    return isinstance(features, (tuple, list)) and all(
        isinstance(one, Tensor) and one.dim() == 4 for one in features
    )


def _said(module: nn.Module, features: Sequence[Tensor], before: str) -> str:
    channels = ", ".join(str(one.size(1)) for one in features)
    taken = getattr(module, "in_channels", "others")
    return f"in_channels: expected those of the {before}'s feature maps, {channels}, got {taken}"
