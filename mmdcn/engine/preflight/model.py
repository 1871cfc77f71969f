"""Checks of the model in a config: types that nobody registered, and what its heads predict."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmdcn.errors import did_you_mean

from .nodes import Problems, children, class_of, join

# Heads whose classes are not those of the objects: of anchors, and of pixels.
_OTHER_CLASSES = re.compile(r"(rpn|semantic|seg)_head(\[\d+\])?$")
_COUNTS = ("num_classes", "num_things_classes", "num_stuff_classes")


def missing_types(node: Any, where: str) -> Problems:
    """Types that no registry knows, at the keys whose values are certainly built from one."""
    name = node.get("type") if isinstance(node, Mapping) else None
    scoped = isinstance(name, str) and "." in name
    scope = name.partition(".")[0] if scoped else name and node.get("_scope_", "mmdet")
    if scope in (None, "mmdet", "mmengine", "mmcv", "mmdcn"):
        # The parts of another project's module resolve in that project's registries.
        for key, child in children(node):
            yield from missing_types(child, join(where, key))
    key = re.sub(r"\[\d+\]$", "", where.rpartition(".")[-1])
    built = re.fullmatch(r"model|backbone|neck|\w*head|dcn|\w*(conv|norm|act)_cfg", key)
    if not built or not isinstance(name, str):
        return

    from mmdet.registry import MODELS

    # A scope in the name wins over the default scope, as in the toolbox's own builders.
    with MODELS.switch_scope_and_registry(None) as registry:
        kind = registry.get(name)
        if kind is not None:
            rank = getattr(kind, "rank", 2)
            if key in ("dcn", "conv_cfg") and rank != 2:
                expected = "a convolution of images, such as 'DCNv2'"
                yield f"{where}.type", f"expected {expected}, got {name!r}, which is {rank}-D"
            return
        known = set(registry.module_dict) | set(MODELS.module_dict) | set(MODELS.parent.module_dict)
    kind = {"dcn": "convolution", "conv_cfg": "convolution"}.get(key, "module")
    hint = did_you_mean(name, known)
    yield (
        f"{where}.type",
        f"no {kind} named {name!r} is registered{hint} (a module of yours must be imported through "
        "custom_imports)",
    )


def pretrained(node: Any, where: str) -> Iterator[tuple[str, str]]:
    """The places and files of pretrained weights."""
    if isinstance(node, Mapping) and node.get("type") == "Pretrained":
        yield f"{where}.checkpoint", node.get("checkpoint")
    for key, child in children(node):
        yield from pretrained(child, join(where, key))


def class_counts(node: Any, where: str) -> Iterator[tuple[str, str, int]]:
    """The place, argument and value of each number of classes in the heads that predict objects.

    Where a head does not say it, it is the default of its type. Heads of detectors that read the
    names of their classes (those with a `language_model`) have no such number.
    """
    if isinstance(node, Mapping):
        if "language_model" in node:
            return
        is_head = re.search(r"_head(\[\d+\])?$", where) and not _OTHER_CLASSES.search(where)
        if is_head and not _predicts_pixels(node):
            for argument in _COUNTS:
                count = node.get(argument, _default(node, argument))
                if isinstance(count, int):
                    yield f"{where}.{argument}", argument, count
    for key, child in children(node):
        yield from class_counts(child, join(where, key))


def _type_of(node: Mapping) -> type | None:
    from mmdet.registry import MODELS

    return class_of(node, MODELS)


def _predicts_pixels(node: Mapping) -> bool:
    from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
    from mmdet.models.seg_heads.base_semantic_head import BaseSemanticHead

    kind = _type_of(node)
    return kind is not None and issubclass(kind, (FusedSemanticHead, BaseSemanticHead))


def _default(node: Mapping, argument: str) -> Any:
    """What a head's type takes for an argument that is left out; its bases may be what has it."""
    for kind in getattr(_type_of(node), "__mro__", ()):
        if "__init__" in vars(kind):
            parameter = inspect.signature(kind.__init__).parameters.get(argument)
            if parameter is not None:
                return parameter.default
    return None
