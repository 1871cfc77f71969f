"""Offset branches in checkpoints: their names in other packages, and what is told where they lack.

The DCNv2 packages, and CenterNet, CenterTrack, EDVR and others with them, call the offset branch
``conv_offset_mask``. Its channels are in our order: all offsets, y then x of each tap, then the
modulations.

DCNv3 and DCNv4 are not told of: their weights are those of linear layers, which no plain model has.
A checkpoint with these and without an offset branch is damaged, and mmengine lists what it lacks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_BRANCH, _ELSEWHERE = "conv_offset", "conv_offset_mask"

# The lists that the contexts which are open at present count in.
_counting: list[list[str]] = []


def read_other_keys(layer: nn.Module) -> None:
    """Let a layer with an offset branch load checkpoints in which it has another package's name."""
    layer.register_load_state_dict_pre_hook(_before_loading)


@contextmanager
def absent_branches() -> Iterator[list[str]]:
    """Collect the layers that load a weight from a state dict which has no offset branch for it.

    Yields:
        Their names, each ending in a dot, as they are found while the context lasts.
    """
    names: list[str] = []
    _counting.append(names)
    try:
        yield names
    finally:
        _counting.remove(names)


def _before_loading(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if not hasattr(layer, _ELSEWHERE):  # or else the key is that module's own
        for parameter in ("weight", "bias"):
            theirs = f"{prefix}{_ELSEWHERE}.{parameter}"
            ours = f"{prefix}{_BRANCH}.{parameter}"
            if theirs in state_dict and ours not in state_dict:
                state_dict[ours] = state_dict.pop(theirs)
    has_branch = any(key.startswith(f"{prefix}{_BRANCH}.") for key in state_dict)
    if _counting and f"{prefix}weight" in state_dict and not has_branch:
        _counting[-1].append(prefix)
