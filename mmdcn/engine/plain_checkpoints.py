"""The log line about checkpoints of plain models: the offset branches that start at zero.

mmengine warns of missing keys, and torch returns them; neither says that they are right to be
missing where a deformable model starts from a plain one's weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import mmengine.runner.checkpoint as toolbox
from mmengine.logging import print_log
from torch import nn

from mmdcn.layers._checkpoint_keys import absent_branches

__all__ = ["install", "uninstall"]

_PLACES: tuple[ModuleType | type, ...] = (toolbox, nn.Module)  # Each has a `load_state_dict`.
_originals: dict[ModuleType | type, Callable[..., Any]] = {}
_replacements: dict[ModuleType | type, Callable[..., Any]] = {}


def install() -> None:
    """Have mmengine's and torch's loading of state dicts followed by that line."""
    for place in _PLACES:
        if place not in _originals:
            _originals[place] = place.load_state_dict
            _replacements[place] = _telling(place.load_state_dict)
            place.load_state_dict = _replacements[place]


def uninstall() -> None:
    """Give both back, unless somebody else has replaced them meanwhile."""
    while _originals:
        place, original = _originals.popitem()
        if place.load_state_dict is _replacements.pop(place):
            place.load_state_dict = original


def _telling(load_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_state_dict)
    def load(*args: Any, **kwargs: Any) -> Any:
        with absent_branches() as names:
            result = load_state_dict(*args, **kwargs)
        if names:
            print_log(_line(names), logger="current")
        return result

    return load


def _line(names: list[str]) -> str:
    count = "1 offset branch" if len(names) == 1 else f"{len(names)} offset branches"
    first = names[0].removesuffix(".") or "the model itself"
    return (
        f"The checkpoint has no weights for {count} of deformable layers whose own weights it has "
        f"({first}{', …' * (len(names) > 1)}): the branches keep what they have, in a new model "
        "zero, where the layers sample as plain convolutions do. That is right for the checkpoint "
        "of a plain model, and wrong for that of a deformable one."
    )
