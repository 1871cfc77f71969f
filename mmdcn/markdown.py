"""Tables in Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]], left: int = 1) -> list[str]:
    """Lines of a table.

    Args:
        header: a cell for each column.
        rows: of as many cells.
        left: how many columns are aligned to the left; the others hold numbers.
    """
    alignment = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(map(str, line))} |" for line in (header, alignment, *rows)]
