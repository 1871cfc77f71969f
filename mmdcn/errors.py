"""Errors: the kind that ends a tool with its message alone, and what others say, on one line."""

import difflib
from collections.abc import Callable, Iterable


class InputError(Exception):
    """A mistake in what a tool was given; its message is all that its user needs to see."""


class LibraryError(ImportError):
    """The compiled operators are missing or do not load; the message says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def did_you_mean(name: str, known: Iterable[str], write: Callable[[str], str] = repr) -> str:
    """The end of an error's sentence that names what is close to a name; nothing if nothing is.

    Example:
        >>> did_you_mean("DCNV2", ["DCN", "DCNv2", "Conv2d"])
        "; did you mean 'DCNv2' or 'DCN'?"
    """
    close = difflib.get_close_matches(name, list(known))
    return f"; did you mean {' or '.join(map(write, close))}?" if close else ""


def named_first_line(error: BaseException) -> str:
    """The type of an exception, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
