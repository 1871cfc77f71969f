"""Which programs get mmdcn at once, and which after their arguments are read."""

import importlib
import os
import signal
import sys
import types

import pytest

import mmdcn
from mmdcn import startup


@pytest.fixture(autouse=True)
def imported_at_once(monkeypatch):
    monkeypatch.setattr(startup, "_postponed", False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("argv", "orig_argv", "ours"),
    [
        (["-m"], ["python", "-m", "mmdcn.check"], True),
        (["-m", "--help"], ["python", "-X", "dev", "-m", "mmdcn.check", "--help"], True),
        (["-m"], ["python", "-mmmdcn.check"], True),
        # A package that imports mmdcn while Python looks for its module.
        (["-m"], ["python", "-m", "their.training"], False),
        (["-m", "mmdcn.check"], ["python", "-m", "their.training", "mmdcn.check"], False),
        (["-m"], ["python", "-m", "mmdcn_like.training"], False),
        # Found, and running.
        (["/x/mmdcn/check.py"], ["python", "-m", "mmdcn.check"], False),
        (["train.py"], ["python", "train.py"], False),
        (["-c"], ["python", "-c", "import mmdcn"], False),
        ([], ["python"], False),
    ],
)
def test_a_module_of_ours_that_is_run_by_name(monkeypatch, argv, orig_argv, ours):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert startup.postponed() == ours


def test_a_program_that_says_so(monkeypatch):
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert not startup.postponed()
    main.__arguments_first__ = True
    assert startup.postponed()
    assert not startup.postponed()  # the second import is the whole one


def test_what_is_missing_is_a_sentence_and_all_else_a_traceback(monkeypatch, capsys):
    def said(error):
        startup.say_what_is_missing(type(error), error, None)
        return capsys.readouterr().err

    for name in startup.NEEDED:
        line = said(ModuleNotFoundError(f"No module named '{name}'", name=name))
        assert line.startswith("error: this Python (") and f"has no module {name}: " in line
    theirs = ModuleNotFoundError("No module named 'torch.gone'", name="torch.gone")
    for error in (theirs, ImportError("x"), ZeroDivisionError("x")):
        assert said(error).startswith(type(error).__name__)
    monkeypatch.setenv("RANK", "1")
    assert said(ModuleNotFoundError("No module named 'torch'", name="torch")) == ""


def test_loading_is_importing_once(monkeypatch):
    reloaded = []
    monkeypatch.setattr(importlib, "reload", reloaded.append)
    startup.load()
    assert reloaded == []
    monkeypatch.setattr(startup, "_postponed", True)
    startup.load()
    assert reloaded == [mmdcn]


def test_an_interruption_before_the_program_has_begun(monkeypatch):
    """Sent in a callback, as of weak references, where Python loses exceptions."""
    main = types.ModuleType("__main__")
    main.__arguments_first__ = True
    monkeypatch.setitem(sys.modules, "__main__", main)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    startup.postponed()

    class Forgotten:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def program():
        del forgotten[:]
        os._exit(0)

    forgotten = [Forgotten()]
    assert ended(program) == (130, "interrupted\n")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    forgotten.clear()


def test_interruptions_that_a_shell_ignores_stay_so(monkeypatch):
    """As those of a terminal are by what runs in the background."""
    main = types.ModuleType("__main__")
    main.__arguments_first__ = True
    monkeypatch.setitem(sys.modules, "__main__", main)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    startup.postponed()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def ended(program):
    """The exit status of a function's own process, and what it said."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        sys.stderr = os.fdopen(2, "w")
        try:
            program()
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as said:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read()
