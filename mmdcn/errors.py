"""Errors: the kind that ends a tool with its message alone, and what others say, on one line."""


class InputError(Exception):
    """A mistake in what a tool was given; its message is all that its user needs to see."""


class LibraryError(ImportError):
    """The compiled operators are missing or do not load; the message says what to do."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def named_first_line(error: BaseException) -> str:
    """The type of an exception, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
