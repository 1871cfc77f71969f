"""What ends a tool by nobody's mistake, in a sentence: a failed download, a full disk, a signal."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import multiprocessing
import os
import re
import signal
import sys
import traceback
import urllib.error
from collections.abc import Iterator
from multiprocessing.queues import Queue
from types import FrameType
from typing import Any

from mmdcn.files import DISK_ERRORS

# What torch's own writer of zip files says where the disk takes no more.
_TORN_ZIP = re.compile(r"inline_container\.cc.* unexpected pos|PytorchStreamWriter failed writing")
_NO_SHARED_MEMORY = re.compile(
    r"Bus error|shared memory|unable to \w+ (to )?file </torch_"
    rf"|DataLoader worker .* exited unexpectedly with exit code {errno.ENOSPC}\b"
)
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed|exited)")
_ENDED_BY = re.compile(r"DataLoader worker .* (signal: .*?|exit code \d+)\.")
# Where the toolbox reads images, as tracebacks have it.
_LOADING = "mmcv/transforms/loading.py"
# What mmcv says where it has an operator for other devices alone.
_NO_KERNEL = re.compile(r"(\w+?)(?:_impl)?: implementation for device (\w+):?\d* not found")
_CAUGHT = re.compile(r"Caught (\w+) in DataLoader worker process")


def sentence(error: Exception) -> str | None:
    """What happened, and what to do; None where it is something else, which a traceback tells."""
    if isinstance(error, urllib.error.URLError):
        return of_download(error)
    kinds = (of_shared_memory, of_disk, of_worker, of_image, of_device)
    return next(filter(None, (of_kind(error) for of_kind in kinds)), None)


def of_download(error: urllib.error.URLError) -> str:
    """What to do about a download that failed, with the address where it is known."""
    urls = (frame.f_locals.get("url") for frame in _frames(error))
    url = next((url for url in urls if isinstance(url, str)), None)
    what = f" of {url}" if url else ""
    reason = error if isinstance(error, urllib.error.HTTPError) else error.reason
    return (
        f"a download failed{what}: {reason}. Download it elsewhere, and name the file in place of "
        "the address"
    )


def of_disk(error: Exception) -> str | None:
    """What to do about a disk that takes no more; None where that is not what happened."""
    if isinstance(error, RuntimeError) and _TORN_ZIP.search(str(error)):
        number, reason = errno.ENOSPC, os.strerror(errno.ENOSPC)
    elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
        number, reason = error.errno, os.strerror(error.errno)
    else:
        return None
    name = getattr(error, "filename", None) or _file_in(error)
    where = f" of {os.fspath(name)}" if name else ""
    if number == errno.EROFS:
        return f"the disk{where} is read-only: choose another folder"
    return (
        f"the disk{where} takes no more ({reason}): free some of it, or choose another folder, and "
        "start again. Files that were there before are whole"
    )


def of_shared_memory(error: Exception) -> str | None:
    """What to do about a full /dev/shm, by which processes that read data hand it over."""
    if isinstance(error, RuntimeError):
        is_full = any(map(_NO_SHARED_MEMORY.search, _messages(error)))
    else:
        # The locks of the loaders' queues are there, too.
        modules = (frame.f_globals.get("__name__") for frame in _frames(error))
        full_disk = isinstance(error, OSError) and error.errno == errno.ENOSPC
        is_full = full_disk and "multiprocessing.synchronize" in modules
    if not is_full:
        return None
    return (
        "the shared memory (/dev/shm) is full, through which the processes that read the data hand "
        "it over: make it larger (`docker run --shm-size=8g`), or set num_workers=0, and "
        "persistent_workers=False, in the data loaders"
    )


def of_worker(error: Exception) -> str | None:
    """What to do about a process that read the data and is no more."""
    if not isinstance(error, RuntimeError) or not _DEAD_WORKER.match(str(error)):
        return None
    found = next(filter(None, map(_ENDED_BY.search, _messages(error))), None)
    by = f" ({found[1]})" if found else ""
    return (
        f"a process that reads the data was ended by the system{by}, often for lack of memory: "
        "lower num_workers or batch_size of the data loaders, and start again"
    )


def of_image(error: Exception) -> str | None:
    """Which image could not be read while a run was under way."""
    names = [frame.f_code.co_filename for frame in _frames(error)]
    if not any(name.endswith(_LOADING) for name in names) and _LOADING not in str(error):
        return None
    *_, said = str(error).strip().splitlines() or [type(error).__name__]
    found = re.search(r"(?:failed to load image: |No such file or directory: )(.*)", said)
    name = found[1] if found else _image_in(error)
    what = f"the image {name}" if name else f"an image of the data: {said}"
    return (
        f"cannot read {what}: put it right, or take it out of the data; training goes on from its "
        "last checkpoint with --resume"
    )


def _image_in(error: BaseException) -> str | None:
    """The name of the image that was being read, of which OpenCV says nothing."""
    results = (frame.f_locals.get("results") for frame in _frames(error))
    names = (r.get("img_path") for r in results if isinstance(r, dict))
    return next((name for name in names if isinstance(name, str)), None)


def of_device(error: Exception) -> str | None:
    """What to do about an operator of mmcv's own that the device has not."""
    found = _NO_KERNEL.match(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    return (
        f"mmcv's operator {found[1]}, which this model calls, does not compute on {found[2]}: use "
        "another device, such as a GPU"
    )


def without_worker(message: str) -> str:
    """What a mistake says that a process found which reads the data, without its traceback."""
    found = _CAUGHT.match(message)
    if found is None:
        return message
    said = re.findall(rf"^(?:[\w.]+\.)?{found[1]}: (.*)", message, re.MULTILINE)
    return said[-1] if said else message


def _messages(error: BaseException | None) -> Iterator[str]:
    """What an error says, and those that it came of."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


def _file_in(error: BaseException) -> str | None:
    """The name of the file that was being written."""
    for frame in reversed(_frames(error)):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str):
                return value.name
    return None


# ----------------------------------------------------------------- what Python itself would print


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """Say in a line what Python prints tracebacks of, and goes on: a log that takes no more.

    Torch's loader of data prints one, too, where it could not be made: after the block, as what
    ends the program refers to it. And where a process that reads the data finds the shared memory
    full, its batch is lost, and the program would wait for it for ever.
    """
    handle, hook, lose = (
        logging.Handler.handleError,
        sys.unraisablehook,
        Queue._on_queue_feeder_error,
    )
    told = set()

    def lost(error: Exception, batch: Any) -> None:
        if of_shared_memory(error) and multiprocessing.parent_process() is not None:
            os._exit(errno.ENOSPC)  # which torch tells the process that waits
        lose(error, batch)

    def handle_error(handler: logging.Handler, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            handle(handler, record)
        elif handler not in told:
            told.add(handler)
            name = getattr(handler, "baseFilename", "the log")
            print(f"{name} is incomplete: {os.strerror(error.errno)}", file=sys.stderr)

    def unraisable(what: Any) -> None:
        name = getattr(what.object, "__qualname__", "")
        if name != "_MultiProcessingDataLoaderIter.__del__":
            hook(what)

    logging.Handler.handleError, sys.unraisablehook = handle_error, unraisable
    Queue._on_queue_feeder_error = staticmethod(lost)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logging.Handler.handleError = handle
        Queue._on_queue_feeder_error = staticmethod(lose)


class Terminated(KeyboardInterrupt):
    """The program was asked to end, by ``kill`` or by what runs its jobs."""


def interruption(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an error is, or that it came of.

    One that comes while a lock is waited for ends as the error of the lock, which is then released
    though it is not held.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt):
        found = found.__context__
    return found


@contextlib.contextmanager
def termination_raised() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated` in this process, so that what is unfinished is removed.

    It ends at once the processes that this one forks, as before.
    """
    process = os.getpid()

    def handler(*_: object) -> None:
        if os.getpid() == process:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise Terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
