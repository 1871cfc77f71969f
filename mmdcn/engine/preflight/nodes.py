"""Parts of a config: what is at a place in it, and what the place is called."""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import Registry

from mmdcn.startup import is_first_process

# What each check yields: the place in the config, and what is wrong there.
Problems = Iterator[tuple[str, str]]

#: What :func:`warn` has said since somebody emptied this list.
said: list[str] = []


def warn(message: str) -> None:
    """Say what does not keep a config from running, once in a distributed run."""
    if is_first_process() and message not in said:
        said.append(message)
        print_log(message, logger="current", level=logging.WARNING)


def each(node: Any, where: str) -> Iterator[tuple[Mapping, str]]:
    """The configs at a place that holds one or a list of them."""
    if isinstance(node, Mapping):
        yield node, where
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            if isinstance(child, Mapping):
                yield child, f"{where}.{index}"


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """The keys or numbers of what a node contains, each with what is there."""
    if isinstance(node, Mapping):
        # `items` of a config with lazy imports builds what it returns.
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)


def join(where: str, key: Any) -> str:
    """The name of a place inside another."""
    return f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"


def class_of(node: Mapping, registry: Registry) -> type | None:
    """The class that a node's type is, or names in a registry; None if there is none."""
    kind = node.get("type")
    if isinstance(kind, str):
        with registry.switch_scope_and_registry(None) as scoped:
            kind = scoped.get(kind)
    return kind if inspect.isclass(kind) else None


def is_local(node: Mapping, *paths: str) -> bool:
    """Whether what a node reads is on this machine's disks."""
    backend = (node.get("backend_args") or {}).get("backend", "local")
    return backend == "local" and not any("://" in path for path in paths)


def missing_file(path: str, where: str) -> Problems:
    """The problem that there is no such file, if so."""
    if not os.path.isfile(os.path.expanduser(path)):
        yield where, f"no file {path!r}"


def missing_weights(path: str, where: str) -> Problems:
    """The problem that there is no such file, or no such kind of address, if so."""
    from mmengine.runner import CheckpointLoader

    if "://" not in path:
        yield from missing_file(path, where)
        return
    schemes = [scheme for scheme in CheckpointLoader._schemes if scheme]
    if not any(re.match(scheme, path) for scheme in schemes):
        kinds = [scheme for scheme in reversed(schemes) if re.fullmatch(r"[\w-]+://", scheme)]
        known = ", ".join(kinds)
        yield where, f"expected a file, or an address that begins with {known}, got {path!r}"


def some(names: Sequence[Any], shown: int = 8) -> str:
    """The first of these names, and how many more there are."""
    listed = ", ".join(map(repr, names[:shown]))
    return f"{listed} and {len(names) - shown} more" if len(names) > shown else listed
