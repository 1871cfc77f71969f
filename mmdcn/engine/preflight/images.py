"""Checks of the images that a COCO file lists: what it says of them, and their files."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from .coco_file import CocoFile
from .tally import Tally, is_id

_OPENED = 100  # spread over all that are used
_EXIF_ORIENTATION = 0x0112

REFUSED = {
    "no key": "lack one of 'id', 'file_name', 'width' and 'height'",
    "bad key": "have an 'id' that is no number, or a 'file_name' that is no string",
    "same id": "have an 'id' that an earlier one has",
    "no size": "have a 'width' or 'height' that is no positive number",
    "no file": "have no file in {folder!r}",
    "no content": "have an empty file in {folder!r}",
    "unreadable": "have a file in {folder!r} that is no image",
}
WARNED = {
    "swapped": "have the width and height of their file swapped",
    "other size": "have another width and height than their file",
}


class Images:
    """The images that a file lists.

    Attributes:
        sizes: width and height by id.
        files: names by id.
        shown: the ids of those that have something to learn.
        refused: the ids of those of which something else is wrong.
    """

    def __init__(self, file: CocoFile) -> None:
        self.tally = Tally()
        self.sizes: dict[Any, tuple[float, float]] = {}
        self.files: dict[Any, str] = {}
        self.shown: set = set()
        self.refused: set = set()
        for image in file.objects("images", "file_name"):
            self.tally.total += 1
            name = image.get("file_name", image.get("id"))
            if is_id(image.get("id")):
                self.refused.add(image["id"])
            if not {"id", "file_name", "width", "height"} <= image.keys():
                self.tally.add("no key", name)
                continue
            key, size = image["id"], (image["width"], image["height"])
            if not (is_id(key) and isinstance(image["file_name"], str)):
                self.tally.add("bad key", name)
                continue
            if not all(isinstance(side, (int, float)) and side > 0 for side in size):
                self.tally.add("no size", name)
                continue
            if key in self.sizes:
                self.tally.add("same id", name)
            self.sizes[key], self.files[key] = size, name
            self.refused.discard(key)

    def look(self, folder: str, only: set | None) -> int:
        """Look at the files of all images, or of some, and return how many were opened."""
        there = []
        for key, name in self.files.items():
            if only is None or key in only:
                try:
                    empty = os.stat(os.path.join(folder, name)).st_size == 0
                except (OSError, ValueError):  # as of a name with a null character
                    self.tally.add("no file", name)
                    continue
                if empty:
                    self.tally.add("no content", name)
                else:
                    there.append(key)
        opened = there[:: max(1, len(there) // _OPENED)]
        for key in opened:
            self._open(os.path.join(folder, self.files[key]), key)
        return len(opened)

    def _open(self, path: str, key: Any) -> None:
        try:
            with Image.open(path) as image:
                width, height = image.size
                # The toolbox turns images as their cameras were held.
                if image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                    width, height = height, width
        except Image.DecompressionBombError:
            return  # too large for a thumbnail's sake, and no mistake of the file's
        except (OSError, SyntaxError):
            self.tally.add("unreadable", self.files[key])
            return
        if self.sizes[key] == (height, width) != (width, height):
            self.tally.add("swapped", self.files[key])
        elif self.sizes[key] != (width, height):
            self.tally.add("other size", self.files[key])
