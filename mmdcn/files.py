"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def once_complete(path: Path) -> Iterator[Path]:
    """Give a temporary name beside a file, whose place it takes when the block ends without error.

    The folders that the file is in are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path: Path, content: str | bytes) -> None:
    """Write a file, and the folders that it is in, under a temporary name until it is complete."""
    with once_complete(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write(path, buffer.getvalue())
