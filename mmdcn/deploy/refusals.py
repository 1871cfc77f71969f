"""The error of what cannot be exported, and how a class is seen to decode as another does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdcn.engine.preflight import ConfigError

__all__ = ["ExportError", "inherits"]


class ExportError(ConfigError):
    """The network cannot be written in standard operators, or what was written is wrong."""


def inherits(instance: Any, ancestor: type, methods: Sequence[str]) -> bool:
    """Whether an object's class has an ancestor's own methods, and overrides none of them."""
    kind = type(instance)
    return issubclass(kind, ancestor) and all(
        getattr(kind, name) is getattr(ancestor, name) for name in methods
    )
