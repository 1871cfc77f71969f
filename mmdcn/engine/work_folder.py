"""Work folders that keep what was made in them, with the settings that it was made with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdcn.engine.preflight import ConfigError
from mmdcn.files import write

__all__ = ["claim", "lock", "read_json"]

SETTINGS = "settings.json"


@contextlib.contextmanager
def lock(folder: Path, what: str = "demo") -> Iterator[None]:
    """Make a folder that is this process's alone within the block, however the process ends.

    Args:
        folder: to be made, unless it is there.
        what: what may be running in it.

    Raises:
        ConfigError: it cannot be written, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(
            f"cannot write to {folder}: {error.strerror}; choose another --work-dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another {what} is running in {folder}; choose another --work-dir"
            ) from None
        yield


def claim(folder: Path, settings: dict, result: str, restart: bool) -> None:
    """Make a folder, unless it is there and was made with the same settings.

    What is worth keeping in a folder with other settings, a result or a checkpoint, goes only
    for a restart.

    Args:
        folder: of one training.
        settings: all that its result follows from, as JSON has it.
        result: the name of the file in it that has the result.
        restart: whether to begin anew where the settings differ.

    Raises:
        ConfigError: the folder was made by something else, or with other settings.
    """
    if folder.exists() and not (folder / SETTINGS).exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} was not made by this demo; choose another --work-dir")
    made_with = read_json(folder / SETTINGS)
    if made_with == settings:
        return
    if (folder / result).exists() or (folder / "last_checkpoint").exists():
        if not restart:
            raise ConfigError(
                f"{folder} was made with other settings ({_differences(made_with, settings)}) and "
                "is kept: choose another --work-dir for these, or --restart to begin it anew"
            )
        print(f"{folder} was made with other settings: starting anew")
    if folder.exists():
        _discard(folder)
    folder.mkdir(parents=True)
    write(folder / SETTINGS, json.dumps(settings, indent=2))


def _differences(old: dict, new: dict, shown: int = 3) -> str:
    """The first settings that differ, with both values."""
    old, new = dict(_flat(old)), dict(_flat(new))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    listed = [f"{name} {_short(old, name)}, now {_short(new, name)}" for name in names[:shown]]
    return "; ".join(listed) + (f"; and {len(names) - shown} more" if len(names) > shown else "")


def _short(values: dict, name: str) -> str:
    return textwrap.shorten(str(values.get(name)), 40)


def _flat(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested settings, each with its place."""
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _flat(child, f"{place}.{key}" if place else str(key))
    else:
        yield place.removeprefix("config."), node


def _discard(folder: Path) -> None:
    """Delete a folder, gone from its place at once even if deleting it takes a while."""
    stale = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(stale, ignore_errors=True)
    folder.rename(stale)
    shutil.rmtree(stale)


def read_json(path: Path) -> Any:
    """What a JSON file has, None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
