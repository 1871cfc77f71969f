"""The wait of mmdcn's import for a program that reads its arguments first.

Torch and the toolbox take seconds to import: too long for ``--help``, or for a mistake in the
arguments. So a tool of ours says, before it imports anything,

    __arguments_first__ = True

and imports something of mmdcn first, from where on an interruption is one line; and
:func:`mmdcn.engine.launch.run` reads its arguments before it imports the rest. For
``python -m mmdcn.check``, Python imports this package before that module can say anything: all
modules of the package that are run so are taken to have said it.

Here is, too, what such a program needs before anything else is imported: which process of a
distributed run it is, and its end where it is interrupted, or where the Python that runs it lacks
what it imports.
"""

import importlib
import os
import signal
import sys
from types import TracebackType

# What a shell says of a program that an interruption ended: 128, and the signal's number.
INTERRUPTED = 128 + signal.SIGINT

# What the programs import, and only their environment has; other modules are a config's own.
NEEDED = ("torch", "numpy", "cv2", "shapely", "rich", "matplotlib", "mmengine", "mmcv", "mmdet")

_postponed = False


def postponed() -> bool:
    """Whether the package's import, which asks this, is to leave out all that takes long."""
    global _postponed
    main = sys.modules.get("__main__")
    _postponed = not _postponed and (
        getattr(main, "__arguments_first__", False) or _is_looking_for_a_module_of_ours()
    )
    if _postponed:
        sys.excepthook = say_what_is_missing
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_at_once)
    return _postponed


def is_first_process() -> bool:
    """Whether this is the first of a distributed run's processes, or the only one."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next(filter(None, map(os.environ.get, names)), "0") == "0"


def say_what_is_missing(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """Say in a sentence that this Python lacks a module of :data:`NEEDED`, as ``sys.excepthook``.

    Of any other error there is a traceback, as ever.
    """
    if not isinstance(error, ModuleNotFoundError) or error.name not in NEEDED:
        sys.__excepthook__(kind, error, trace)
    elif is_first_process():
        print(
            f"error: this Python ({sys.executable}) has no module {error.name}: activate the "
            "environment that has torch and the toolbox (`. .venv/bin/activate` in a checkout, "
            "where `make environment` makes it), and start again",
            file=sys.stderr,
        )


def end_at_once(*_: object) -> None:
    """End a program that is interrupted while it imports, as the handler of the signal.

    An exception would be lost where the signal arrives in a callback, of which Python's own import
    has some; and nothing has been begun that would have to be tidied up.
    """
    _say_interrupted()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def end_interrupted(what_to_do: str | None = None, number: int = signal.SIGINT) -> None:
    """End a program that is interrupted, by one line.

    Args:
        what_to_do: what its user can do then.
        number: the signal that did it.
    """
    _say_interrupted(what_to_do, number)
    sys.exit(INTERRUPTED - signal.SIGINT + number)


def _say_interrupted(what_to_do: str | None = None, number: int = signal.SIGINT) -> None:
    if is_first_process():
        # A terminal shows ^C where the cursor is.
        print("\n" if sys.stderr.isatty() else "", end="", file=sys.stderr)
        said = "interrupted" if number == signal.SIGINT else "terminated"
        print(said + (f"; {what_to_do}" if what_to_do else ""), file=sys.stderr)


def _is_looking_for_a_module_of_ours() -> bool:
    """Whether Python imports this package on its way to the module in ``python -m mmdcn.…``."""
    if sys.argv[:1] != ["-m"]:
        return False
    name = sys.orig_argv[-len(sys.argv)]
    return name.removeprefix("-m").startswith("mmdcn.")


def load() -> None:
    """Import all that was left out."""
    if _postponed:
        importlib.reload(sys.modules["mmdcn"])
