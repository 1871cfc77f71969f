"""COCO annotation files, read object by object: they reach gigabytes."""

from __future__ import annotations

import codecs
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from types import TracebackType

_FIRST_PIECE = 1 << 20  # bytes, enough for thousands of objects
_LARGEST_OBJECT = 1 << 27  # bytes
_SEPARATOR = re.compile(r"[\s,]*")


class CocoFile:
    """A COCO annotation file, whose lists are read one object at a time.

    Use it as a context manager.

    Args:
        path: of the file.
        advance: called with the number of bytes that have been read since it was called last.

    Raises:
        ValueError: the file is not JSON, is cut short, or holds something else.
    """

    def __init__(self, path: str, advance: Callable[[int], object] = lambda size: None) -> None:
        if os.path.getsize(path) == 0:
            raise ValueError("it is empty")
        with open(path, "rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._advance = advance
        try:
            self._check_ends()
        except ValueError:
            self._text.close()
            raise

    def __enter__(self) -> CocoFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._text.close()

    def _check_ends(self) -> None:
        start, end = self._text[:64].lstrip(), self._text[-64:].rstrip()
        if start.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            encoding = "utf-8-sig" if start.startswith(codecs.BOM_UTF8) else "utf-16"
            raise ValueError(
                "it begins with a byte order mark, with which the toolbox does not read it: save "
                f"it as UTF-8 without one, by text = open(path, encoding={encoding!r}).read() and "
                "open(path, 'w', encoding='utf-8').write(text)"
            )
        if start.startswith(b"["):
            raise ValueError(
                "it is a list, as files of predictions are: expected an object with the lists "
                "'images', 'annotations' and 'categories'"
            )
        if start.startswith(b"{") and not end.endswith(b"}"):
            raise ValueError("it does not end with '}'; is the download complete?")
        if not start.startswith(b"{"):
            raise ValueError("it does not start with '{'")

    def check_encoding(self) -> None:
        """Check that all of it is UTF-8, what nobody looks at here too: the toolbox reads it all.

        Raises:
            ValueError: it is not.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(self._text), _FIRST_PIECE):
            piece = self._text[start : start + _FIRST_PIECE]
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece, final=start + _FIRST_PIECE >= len(self._text))
            except UnicodeDecodeError as error:
                raise _not_utf8(start - held + error.start) from None

    def objects(self, key: str, *fields: str, required: bool = True) -> Iterator[dict]:
        """The objects of the list `key`, of which the first has at least one of `fields`.

        Raises:
            ValueError: there is no such list though it is `required`, or it is not well-formed.
        """
        # Other lists may have that name, so take the last one that holds such objects.
        pattern = rb'"%s"\s*:\s*\[(?=\s*\{)' % key.encode()
        starts = [match.end() for match in re.finditer(pattern, self._text)]
        for start in reversed(starts):
            if not set(fields).isdisjoint(next(self._elements(start, lambda size: None))):
                yield from self._elements(start, self._advance)
                return
        others = re.findall(rb'"%s"\s*:\s*(\[?\s*[^\s])' % key.encode(), self._text)
        if required or not all(re.fullmatch(rb"\[\s*\]", other) for other in others):
            raise ValueError(f"it has no list {key!r} of objects with a {fields[0]!r}")

    def _elements(self, start: int, advance: Callable[[int], object]) -> Iterator[dict]:
        """Elements of the list of objects whose opening bracket is just before `start`."""
        decode = json.JSONDecoder().raw_decode
        size = _FIRST_PIECE
        while True:
            piece, index = self._piece(start, size), 0
            whole = start + size >= len(self._text)
            while True:
                begin = _SEPARATOR.match(piece, index).end()
                if piece[begin : begin + 1] == "]":
                    advance(len(piece[:begin].encode()))
                    return
                try:
                    element, index = decode(piece, begin)
                except json.JSONDecodeError:
                    # An object is complete or does not parse: read on, or read more at a time.
                    if whole or size > _LARGEST_OBJECT:
                        raise
                    break
                if not isinstance(element, dict):
                    raise ValueError(f"expected an object, got {str(element)[:40]!r}")
                yield element
            read = len(piece[:index].encode())
            advance(read)
            size = _FIRST_PIECE if index else size * 4
            start += read

    def _piece(self, start: int, size: int) -> str:
        """So many bytes as text, without a character that is cut at the end."""
        piece = self._text[start : start + size]
        try:
            return piece.decode()
        except UnicodeDecodeError as error:
            if error.start < len(piece) - 4:
                raise _not_utf8(start + error.start) from None
            return piece[: error.start].decode()


def _not_utf8(byte: int) -> ValueError:
    return ValueError(
        f"it is not UTF-8 at byte {byte}: if it is Latin-1, as of Windows, save it anew by text = "
        "open(path, encoding='latin-1').read() and open(path, 'w', encoding='utf-8').write(text)"
    )
