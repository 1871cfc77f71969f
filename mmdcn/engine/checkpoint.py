"""Loading checkpoints as plain data: nothing stored in a checkpoint is ever executed.

`install()` makes every checkpoint that the toolbox loads (test, resume, ``load_from``, pretrained
weights, from disk or from the web) go through :func:`load`, which is ``torch.load`` with
``weights_only=True`` and an allow-list of what mmengine itself writes beside the tensors:

- its logs, ``HistoryBuffer`` objects: two numpy arrays and references to their own methods;
- numpy scalars and arrays (best scores, palettes);
- ``ConfigDict`` (dataset meta information that came from a config);
- the annealing functions of its one-cycle schedulers.

The allow-list never contains the real ``getattr``, ``numpy.dtype`` or ``numpy.ndarray``: a crafted
pickle reaches any attribute with the first, and has numpy read bytes as pointers with the others.
Stand-ins take their names, and accept only what an honest checkpoint contains.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import mmengine.runner.checkpoint as toolbox
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from mmdcn.engine import config_text, saving
from mmdcn.errors import InputError, named_first_line

__all__ = ["UnsafeCheckpointError", "install", "installed", "load", "uninstall"]


class UnsafeCheckpointError(InputError, pickle.UnpicklingError):
    """The checkpoint holds something other than plain data; nothing of it has been executed."""


# ---------------------------------------------------------------------------------------------
# Stand-ins for what a checkpoint names. Each one is called with what the file says, so each one
# must be harmless for every argument.


class _PlainDtype:
    """The stand-in for ``numpy.dtype``: numbers, booleans and text, never objects or records."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,6}", code)):
            raise pickle.UnpicklingError(f"numpy data type {code!r} is not plain data")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        _version, byte_order, subarray, names, fields = state[:5]
        if byte_order not in ("<", ">", "=", "|") or (subarray, names, fields) != (None,) * 3:
            raise pickle.UnpicklingError("numpy record types are not plain data")
        self.numpy = self.numpy.newbyteorder(byte_order)


class _PlainArray(np.ndarray):
    """The stand-in for ``numpy.ndarray``. Pickled again, it is an ordinary array."""

    def __new__(cls) -> _PlainArray:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, fortran, data = state
        if type(dtype) is not _PlainDtype or type(data) is not bytes:
            raise pickle.UnpicklingError("a numpy array must be numbers or text to be plain data")
        super().__setstate__((version, shape, dtype.numpy, fortran, data))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return np.asarray(self).__reduce_ex__(protocol)


def _reconstruct_array(_type: Any, _shape: tuple, _typecode: bytes) -> _PlainArray:
    """The stand-in for numpy's ``_reconstruct``: an empty array; its state follows in the file."""
    return _PlainArray()


def _numpy_scalar(dtype: _PlainDtype, data: bytes) -> np.generic:
    if type(dtype) is not _PlainDtype or type(data) is not bytes:
        raise pickle.UnpicklingError("a numpy scalar must be a number or text to be plain data")
    return np.frombuffer(data, dtype.numpy, count=1)[0]


def _empty_bytes() -> bytes:
    """The stand-in for ``bytes``: pickle writes the content of an empty array as a call of it."""
    return b""


class _PlainHistory(HistoryBuffer):
    """The stand-in for ``HistoryBuffer`` while it is read; with its state it is an ordinary one.

    Its own ``__setstate__`` would take functions out of the file into the class, for every buffer
    of the process. Only the two arrays are taken here; the functions are those of the class.
    """

    def __setstate__(self, state: dict) -> None:
        self.max_length = int(state["max_length"])
        self._log_history = np.asarray(state["_log_history"])
        self._count_history = np.asarray(state["_count_history"])
        self._set_default_statistics()
        self.__class__ = HistoryBuffer


# Stands for a class that a checkpoint may name but neither create nor call.
_ONE_CYCLE = "OneCycleParamScheduler"
_NDARRAY = "ndarray"

_MEMBERS = {
    # `_PlainHistory` drops these references anyway.
    (_PlainHistory, "min"): None,
    (_PlainHistory, "max"): None,
    (_PlainHistory, "current"): None,
    (_PlainHistory, "mean"): None,
    (_ONE_CYCLE, "_annealing_cos"): OneCycleParamScheduler._annealing_cos,
    (_ONE_CYCLE, "_annealing_linear"): OneCycleParamScheduler._annealing_linear,
}


def _member(owner: Any, name: str) -> Callable | None:
    """The stand-in for ``getattr``: a table of the members that mmengine refers to."""
    try:
        return _MEMBERS[owner, name]
    except (KeyError, TypeError):
        raise pickle.UnpicklingError(f"GLOBAL getattr was asked for {name!r}") from None


_ALLOWED = [
    (_PlainHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_member, "builtins.getattr"),
    (_ONE_CYCLE, "mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler"),
    (ConfigDict, "mmengine.config.config.ConfigDict"),
    (_empty_bytes, "builtins.bytes"),
    (_PlainDtype, "numpy.dtype"),
    (_NDARRAY, "numpy.ndarray"),
    # The package was renamed in numpy 2; files of both kinds are around.
    *((_reconstruct_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_numpy_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    # Reached through `_reconstruct` only; listed because torch sets no state on unlisted types.
    _PlainArray,
]


# ---------------------------------------------------------------------------------------------


@contextmanager
def _plain_data_only(source: object) -> Iterator[None]:
    """Within, ``torch.load(weights_only=True)`` takes what mmengine writes; refusals explain."""
    users = torch.serialization.get_safe_globals()
    ours = {_name(entry) for entry in _ALLOWED}
    torch.serialization.clear_safe_globals()
    # A stand-in must win over the real thing: a common workaround allows `getattr` itself.
    torch.serialization.add_safe_globals([e for e in users if _name(e) not in ours] + _ALLOWED)
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(_explain(source, str(error))) from None
    except OSError:
        raise  # the error for a missing or unreadable file is clear already
    except Exception as error:
        raise UnsafeCheckpointError(
            f"checkpoint {source} could not be read and nothing of it was executed: it is damaged "
            f"or not a PyTorch checkpoint ({named_first_line(error)})."
        ) from error
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(users)


def _name(entry: Any) -> str:
    """The name under which torch looks up an entry of its list of safe globals."""
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _explain(source: object, message: str) -> str:
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused:
        return (
            f"checkpoint {source} was refused and nothing of it was executed: it names "
            f"{refused.group(1)!r}, which is not plain data and could run code while loading; save "
            "its state_dict alone from a process that you trust, or, if this is a class of yours, "
            "allow it with torch.serialization.add_safe_globals."
        )
    # torch wraps its reason in advice that would execute the file; the message leaves that out.
    reason = message.split("WeightsUnpickler error:")[-1].split("Check the documentation")[0]
    return (
        f"checkpoint {source} was refused and nothing of it was executed: it is damaged, not a "
        f"PyTorch checkpoint, or holds more than plain data ({' '.join(reason.split())}); save its "
        "state_dict alone from a process that you trust."
    )


def load(f: Any, map_location: Any = None, mmap: bool = False) -> Any:
    """Load a checkpoint as plain data.

    Args:
        f: path or open binary file of a checkpoint written by ``torch.save``.
        map_location: as in ``torch.load``.
        mmap: leave tensors in the file until they are used, where its format allows it.

    Returns:
        What was saved. ``meta['config']``, Python text in checkpoints of older toolboxes, is moved
        to ``meta['config_text']``: ``Runner.resume`` would execute it.

    Raises:
        UnsafeCheckpointError: it holds anything else than tensors, plain Python and numpy values,
            what mmengine writes, and classes allowed through ``torch.serialization``.
    """
    with _plain_data_only(getattr(f, "name", f) if hasattr(f, "read") else f):
        is_zipped = zipfile.is_zipfile(f)
        if is_zipped:
            _check_sizes(f)
        mmap = mmap and is_zipped
        checkpoint = torch.load(f, map_location=map_location, weights_only=True, mmap=mmap)
    return _without_config(checkpoint)


def _check_sizes(f: Any) -> None:
    """Check that a zip file is not larger inside than outside, as no file of ``torch.save`` is.

    A small one could fill the memory otherwise.
    """
    start = f.tell() if hasattr(f, "read") else 0
    with zipfile.ZipFile(f) as archive:
        inside = sum(max(entry.file_size, entry.compress_size) for entry in archive.infolist())
        outside = archive.fp.seek(0, 2)
    if hasattr(f, "read"):
        f.seek(start)
    if inside > outside:
        raise pickle.UnpicklingError(
            f"{outside} bytes would become {inside}, and torch.save does not compress"
        )


def _without_config(checkpoint: Any) -> Any:
    meta = checkpoint.get("meta") if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict) and "config" in meta:
        meta["config_text"] = meta.pop("config")
    return checkpoint


def _load_url(url: str, *args: Any, **kwargs: Any) -> Any:
    with _plain_data_only(url):
        checkpoint = torch.hub.load_state_dict_from_url(url, *args, **kwargs, weights_only=True)
    return _without_config(checkpoint)


class _TorchWithPlainLoad(ModuleType):
    """The name ``torch`` as `mmengine.runner.checkpoint` sees it: all of it, but our `load`."""

    load = staticmethod(load)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


# `mmengine.runner.checkpoint` reads files through these names only, whatever the scheme of the
# path (local, http, torchvision, open-mmlab, s3, ...). The last one exists in the maintained fork.
_REPLACED = {
    "torch": _TorchWithPlainLoad("torch"),
    "load_url": _load_url,
    "_safe_torch_load": load,
}
_originals: dict[str, Any] = {}


def install() -> None:
    """Make every checkpoint loader of mmengine load plain data only. Repeating it is harmless.

    Checkpoints are then saved and found as :mod:`mmdcn.engine.saving` says, and the configs in them
    are read by :mod:`mmdcn.engine.config_text`, too.
    """
    if installed():
        return
    saving.install()
    config_text.install()
    for name, replacement in _REPLACED.items():
        if hasattr(toolbox, name):
            _originals[name] = getattr(toolbox, name)
            setattr(toolbox, name, replacement)


def uninstall() -> None:
    """Give mmengine its own loaders back."""
    saving.uninstall()
    config_text.uninstall()
    while _originals:
        setattr(toolbox, *_originals.popitem())


def installed() -> bool:
    """Whether mmengine's loaders go through :func:`load`."""
    return bool(_originals)
