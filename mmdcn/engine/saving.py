"""Saving of checkpoints so that a run that is killed at any moment goes on from the last one.

`install()` changes three things in mmengine, for every run of the process:

- a file that its local backend writes, checkpoints among them, and a config, appears under its
  name once it is complete: until then it has a temporary one, which no program takes for a
  checkpoint;
- its checkpoint hook deletes a checkpoint that is one too many, and the former best one, when the
  new one is there, and not before;
- to resume, it takes the checkpoint that the work folder's ``last_checkpoint`` names, or, where
  that is missing or cut short, the newest one that is complete.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log

from mmdcn.files import once_complete, write

__all__ = ["find_latest_checkpoint", "install", "is_complete", "uninstall"]


# ---------------------------------------------------------------------------------- writing files


def _put(backend: LocalBackend, content: bytes, path: str | Path) -> None:
    """Write a file whole or not at all, in place of mmengine's ``LocalBackend.put``."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        _originals[LocalBackend, "put"](backend, content, path)  # a device or a pipe
        return
    with once_complete(target) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # so that a machine that goes down leaves it whole too


def _dump(cfg: Config, file: str | Path | None = None) -> str | None:
    """Write a config whole or not at all, in place of mmengine's method."""
    if file is None or not str(file).endswith(".py"):
        return _originals[Config, "dump"](cfg, file)  # by the backend
    write(Path(os.path.realpath(file)), cfg.pretty_text)
    return None


# ---------------------------------------------------------------------------- deleting checkpoints


def _save_checkpoint_with_step(hook: CheckpointHook, runner: Any, step: int, meta: dict) -> None:
    """Save first, and delete then, in place of mmengine's method."""
    outdated = None
    if hook.max_keep_ckpts > 0:
        kept = hook.keep_ckpt_ids
        if len(kept) == hook.max_keep_ckpts and kept[-1] != step:
            outdated = kept.popleft()
    _originals[CheckpointHook, "_save_checkpoint_with_step"](hook, runner, step, meta)
    if outdated is not None:
        name = hook.filename_tmpl.format(outdated)
        _remove(hook, hook.file_backend.join_path(hook.out_dir, name))


def _save_best_checkpoint(hook: CheckpointHook, runner: Any, metrics: dict) -> None:
    """Keep the former best one until there is a better one, in place of mmengine's method."""
    save = functools.partial(_originals[CheckpointHook, "_save_best_checkpoint"], hook, runner)
    if not hook.save_best:
        save(metrics)
        return
    if len(hook.key_indicators) == 1:
        former, hook.best_ckpt_path = hook.best_ckpt_path, None
        save(metrics)
        hook.best_ckpt_path = _better(hook, former, hook.best_ckpt_path)
        return
    former, hook.best_ckpt_path_dict = hook.best_ckpt_path_dict, dict.fromkeys(hook.key_indicators)
    save(metrics)
    for key, path in former.items():
        hook.best_ckpt_path_dict[key] = _better(hook, path, hook.best_ckpt_path_dict.get(key))


def _better(hook: CheckpointHook, former: str | None, new: str | None) -> str | None:
    """The best checkpoint now; the former one is deleted where there is another."""
    if new is None:
        return former
    if former is not None and former != new:
        _remove(hook, former)
    return new


def _remove(hook: CheckpointHook, path: str) -> None:
    if not is_main_process():
        return
    if hook.file_backend.isfile(path):
        hook.file_backend.remove(path)
    elif hook.file_backend.isdir(path):
        hook.file_backend.rmtree(path)  # as deepspeed saves it


# --------------------------------------------------------------------------------------- resuming


def is_complete(path: str | Path) -> bool:
    """Whether a checkpoint was written to its end, as far as its format tells without reading it.

    Example:
        >>> is_complete("no_such_file.pth")
        False
    """
    path = Path(path)
    if path.is_dir():
        return True  # as deepspeed saves it
    if not path.is_file():
        return False
    # What torch writes is a zip archive, whose directory comes last. Its former format, a pickle,
    # has no such end; reading it will tell.
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def find_latest_checkpoint(path: str) -> str | None:
    """The checkpoint to go on from in a work folder, in place of mmengine's function.

    Args:
        path: the folder.

    Returns:
        What the folder's ``last_checkpoint`` names; the newest complete checkpoint beside it where
        that is missing or cut short; None where there is none.
    """
    record = Path(path, "last_checkpoint")
    named = record.read_text().strip() if record.is_file() else ""
    if "://" in named or (named and is_complete(named)):
        return named
    folder = Path(named).parent if named and Path(named).parent.is_dir() else Path(path)
    complete = [
        file
        for file in folder.glob("*.pth")
        if re.fullmatch(r"(epoch|iter)_\d+", file.stem) and is_complete(file)
    ]
    newest = max(complete, key=lambda file: file.stat().st_mtime_ns, default=None)
    if record.is_file() or newest is not None:
        what = f"{named}, which is missing or cut short" if named else "no checkpoint"
        print_log(
            f"{record} names {what}: going on from {newest or 'the beginning'}.",
            logger="current",
            level=logging.WARNING,
        )
    else:
        print_log("Did not find last_checkpoint to be resumed.", logger="current")
    return None if newest is None else str(newest)


# ------------------------------------------------------------------------------------ installation

_REPLACED: dict[tuple[type, str], Callable] = {
    (LocalBackend, "put"): _put,
    (Config, "dump"): _dump,
    (CheckpointHook, "_save_checkpoint_with_step"): _save_checkpoint_with_step,
    (CheckpointHook, "_save_best_checkpoint"): _save_best_checkpoint,
}
# The modules in which mmengine has its function by name.
_FINDERS = (
    "mmengine.runner.checkpoint",
    "mmengine.runner.runner",
    "mmengine.runner._flexible_runner",
    "mmengine.runner",
)
_originals: dict[tuple[Any, str], Callable] = {}


def install() -> None:
    """Make mmengine save and find checkpoints so. Repeating it is harmless."""
    if _originals:
        return
    replaced = dict(_REPLACED)
    for name in _FINDERS:
        replaced[importlib.import_module(name), "find_latest_checkpoint"] = find_latest_checkpoint
    for (owner, name), replacement in replaced.items():
        _originals[owner, name] = getattr(owner, name)
        setattr(owner, name, replacement)


def uninstall() -> None:
    """Give mmengine its own functions back."""
    while _originals:
        (owner, name), original = _originals.popitem()
        setattr(owner, name, original)
