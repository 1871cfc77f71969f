"""Checks of what a model's parts hand to each other: channels, and how many feature maps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .building import silence
from .nodes import Problems

_SIZE = 256  # of an image, which every backbone can halve often enough
# And not "input size per channel", of maps that are too small for a kernel, as SSD's last ones are.
_OF_CHANNELS = re.compile("(?<!per )channel")


def channel_problems(model: nn.Module, node: Mapping) -> Problems:
    """A neck or a head that cannot take the feature maps of what is before it.

    Args:
        model: on the meta device, where nothing is computed. It is in evaluation mode afterwards.
        node: its config.
    """
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead

    backbone, neck = getattr(model, "backbone", None), getattr(model, "neck", None)
    if backbone is None:
        return
    model.eval()
    features = _result(backbone, torch.empty(1, 3, _SIZE, _SIZE, device="meta"))
    if not _are_maps(features):
        return  # it takes something else, or needs values
    before = "backbone"
    if neck is not None:
        if _is_refused(neck, features):
            yield "model.neck", _said(neck, features, before)
        features, before = _result(neck, features), "neck"
        if not _are_maps(features):
            return
    for name in ("rpn_head", "bbox_head"):
        head = getattr(model, name, None)
        if isinstance(head, BaseDenseHead) and _is_refused(head, features):
            # mmdet's RPN calls its rpn_head bbox_head.
            yield f"model.{name if name in node else 'rpn_head'}", _said(head, features, before)
    yield from _transformer_problems(model, features, before)
    if getattr(model, "roi_head", None) is not None:
        yield from _roi_problems(model.roi_head, features, before)


# -------------------------------------------------------------------- what takes the feature maps


def _is_refused(module: nn.Module, given: Any) -> bool:
    """Whether a module fails because of the channels, or the number, of what it is given.

    That is certain where torch says so of a convolution, and where the same call works with the
    channels that the module says it takes; other failures are of arguments that are no features, or
    of values, which are not there.
    """
    error = _error(module, given)
    if error is None:
        return False
    if isinstance(error, (RuntimeError, ValueError)) and _OF_CHANNELS.search(str(error)):
        return True
    declared = _with_channels(given, getattr(module, "in_channels", None))
    return declared is not None and _error(module, declared) is None


def _with_channels(given: Any, channels: Any) -> Any:
    """What is given, with other channels; None where there are no others."""
    if isinstance(given, Tensor):
        if type(channels) is not int or channels == given.size(1):
            return None
        return given.new_empty(given.size(0), channels, *given.shape[2:])
    if type(channels) is int:
        channels = [channels] * len(given)
    if not isinstance(channels, Sequence) or not all(type(c) is int for c in channels):
        return None
    if list(channels) == [one.size(1) for one in given]:
        return None
    heights = [one.size(2) for one in given] + [1] * len(channels)
    if len(channels) != len(given):
        heights = [max(1, heights[0] >> level) for level in range(len(channels))]
    return tuple(
        torch.empty(1, count, size, size, device="meta")
        for count, size in zip(channels, heights, strict=False)
    )


def _result(module: Callable, given: Any) -> Any:
    """What a module makes of something; None where it fails."""
    try:
        with torch.no_grad(), silence():
            return module(given)
    except Exception:
        return None


def _error(module: Callable, given: Any) -> Exception | None:
    try:
        with torch.no_grad(), silence():
            module(given)
    except Exception as error:
        return error
    return None


def _are_maps(features: Any) -> bool:
    return isinstance(features, (tuple, list)) and all(
        isinstance(one, Tensor) and one.dim() == 4 for one in features
    )


def _said(module: nn.Module, features: Sequence[Tensor], before: str) -> str:
    taken = getattr(module, "in_channels", "others")
    return (
        f"in_channels: expected those of the {before}'s feature maps, {_listed(features)}, "
        f"got {taken}"
    )


def _listed(features: Sequence[Tensor]) -> str:
    return ", ".join(str(one.size(1)) for one in features)


# ------------------------------------------------------------------------------------ transformers


def _transformer_problems(model: nn.Module, features: Sequence[Tensor], before: str) -> Problems:
    """DETR and its kind: all that they are given is added to embeddings of one width."""
    from mmdet.models.detectors import DETR, DeformableDETR

    # A model with a preparation of its own may project what it is given.
    own = getattr(type(model), "pre_transformer", None)
    embed_dims = getattr(model, "embed_dims", None)
    if own not in (DETR.pre_transformer, DeformableDETR.pre_transformer):
        return
    if own is DETR.pre_transformer:
        features = features[-1:]  # it looks at no other
    levels = getattr(model, "num_feature_levels", None)
    if type(embed_dims) is int and any(one.size(1) != embed_dims for one in features):
        yield (
            "model.encoder",
            f"embed_dims: expected that of the {before}'s feature maps, {_listed(features)}, got "
            f"{embed_dims}",
        )
    elif own is DeformableDETR.pre_transformer and levels != len(features):
        yield (
            "model.num_feature_levels",
            f"expected the number of the {before}'s feature maps, {len(features)}, got {levels}",
        )


# --------------------------------------------------------------------------------------- RoI heads


def _roi_problems(roi_head: nn.Module, features: Sequence[Tensor], before: str) -> Problems:
    """An RoI head whose extractor, box heads or mask heads cannot take what they are given."""
    seen = set()
    for kind, index, extractor, head in _roi_parts(roi_head):
        used = features[: extractor.num_inputs]
        place = f"model.roi_head.{kind}"
        # It writes what it pools from several maps into a tensor of its out_channels.
        if len(used) > 1 and any(one.size(1) != extractor.out_channels for one in used):
            said = (
                f"out_channels: expected those of the {before}'s feature maps, {_listed(used)}, "
                f"got {extractor.out_channels}"
            )
            if (kind, said) not in seen:
                yield f"{place}_roi_extractor", said
            seen.add((kind, said))
            continue
        height, width = extractor.roi_layers[0].output_size
        pooled = torch.empty(2, used[0].size(1), height, width, device="meta")
        if kind == "bbox" and getattr(roi_head, "with_shared_head", False):
            pooled = _result(roi_head.shared_head, pooled)
        if isinstance(pooled, Tensor) and _is_refused(head, pooled):
            yield (
                f"{place}_head{index}",
                f"in_channels: expected those that it is given, {pooled.size(1)}, got "
                f"{head.in_channels}",
            )


def _roi_parts(
    roi_head: nn.Module,
) -> Iterator[tuple[str, str, nn.Module, nn.Module]]:
    """Extractors and the heads after them, where they are called as in the toolbox's own RoI heads.

    Others look at more than one map for an RoI, or add features of other kinds.
    """
    from mmdet.models.roi_heads import CascadeRoIHead, SingleRoIExtractor, StandardRoIHead

    for kind in ("bbox", "mask"):
        called = getattr(type(roi_head), f"_{kind}_forward", None)
        known = [getattr(c, f"_{kind}_forward") for c in (StandardRoIHead, CascadeRoIHead)]
        if called not in known:
            continue
        if kind == "mask" and getattr(roi_head, "with_shared_head", False):
            continue
        extractor = getattr(roi_head, f"{kind}_roi_extractor", None)
        head = getattr(roi_head, f"{kind}_head", None)
        if isinstance(extractor, nn.ModuleList) and isinstance(head, nn.ModuleList):
            parts = [(f"[{i}]", *pair) for i, pair in enumerate(zip(extractor, head, strict=False))]
        else:
            parts = [("", extractor, head)]
        for index, one, its_head in parts:
            if its_head is not None and getattr(type(one), "forward", None) is (
                SingleRoIExtractor.forward
            ):
                yield kind, index, one, its_head
