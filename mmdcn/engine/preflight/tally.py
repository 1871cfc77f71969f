"""Counts of what was found in a file, and of which kind its values are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_EXAMPLES = 3


@dataclass
class Tally:
    """How often each thing was found, and the first names."""

    total: int = 0
    found: dict[str, list] = field(default_factory=dict)

    def add(self, what: str, name: Any) -> None:
        count_and_names = self.found.setdefault(what, [0])
        count_and_names[0] += 1
        if len(count_and_names) <= _EXAMPLES:
            count_and_names.append(name)

    def count(self, *what: str) -> int:
        return sum(self.found.get(one, [0])[0] for one in what)

    def sentences(self, noun: str, what: dict[str, str], of: int | None = None) -> Iterator[str]:
        """What of it was found: counts, names, and what that means."""
        for key, meaning in what.items():
            if key in self.found:
                count, *names = self.found[key]
                more = ", …" if count > len(names) else ""
                listed = ", ".join(map(repr, names)) + more
                total = self.total if of is None else of
                yield f"{count} of {total} {noun} {meaning} ({listed})"


def is_id(value: Any) -> bool:
    """Whether a value can be the id of an image, a category or an annotation."""
    return isinstance(value, (int, float, str))


def are_numbers(values: Any, count: int) -> bool:
    """Whether a value is a list of so many numbers."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )
