"""Checks of the annotations in a COCO file, and of the images that it lists.

What the toolbox would leave out or train on all the same is warned of; what would stop a run or
spoil what it learns is refused. Both come with a count, and the first few named.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from .coco_file import CocoFile
from .nodes import Problems

_EXAMPLES = 3
_IMAGES_OPENED = 100  # spread over all that are used
_SHOWS_PROGRESS = 50e6  # bytes of a file that takes more than a second
_TOLERANCE = 1.0  # pixels by which a box may reach outside, as labels are rounded
_EXIF_ORIENTATION = 0x0112

_REFUSED = {
    "no id": "have no 'id'",
    "same id": "have an 'id' that an earlier one has",
    "no image_id": "have no 'image_id'",
    "no category_id": "have no 'category_id'",
    "no bbox": "have no 'bbox' of four numbers x, y, width and height",
    "not finite": "have a 'bbox' or 'area' that is NaN or infinite",
    "no area": "have no 'area': width * height of the box would do",
    "no iscrowd": "have no 'iscrowd', which COCO's evaluation reads: 0 would do",
    "no mask": "have no 'segmentation', which LoadAnnotations(with_mask=True) reads",
}
_WARNED = {
    "unknown image": "belong to no image of the file and are left out",
    "unknown category": "have a 'category_id' that no category has, and are left out",
    "other class": "are of categories that the class list lacks, and are left out",
    "negative": "have a negative width or height and are left out",
    "empty": "have a width, a height or an area below 1 or of 0 and are left out",
    "outside": "lie outside their image and are left out",
    "reaches out": "reach outside their image by more than a pixel, and are used as they are",
    "id 0": "have the 'id' 0, whose match COCO's evaluation counts as none",
}
_IMAGES_REFUSED = {
    "no key": "lack one of 'id', 'file_name', 'width' and 'height'",
    "same id": "have an 'id' that an earlier one has",
    "no size": "have a 'width' or 'height' that is no positive number",
    "no file": "have no file in {folder!r}",
    "no content": "have an empty file in {folder!r}",
    "unreadable": "have a file in {folder!r} that is no image",
}
_IMAGES_WARNED = {
    "swapped": "have the width and height of their file swapped",
    "other size": "have another width and height than their file",
}


@dataclass(frozen=True)
class Use:
    """What annotations are for.

    Attributes:
        folder: of the images, None where they cannot be looked at.
        classes: names of those that are learned, None where all are.
        training: whether a model is trained on them.
        masks: whether their masks are loaded.
        evaluation: whether predictions are compared with them by COCO's metric.
        unique_ids: whether two with one id stop the toolbox.
        skips_empty: whether images without an annotation of the classes are left out.
    """

    folder: str | None = None
    classes: Sequence[str] | None = None
    training: bool = False
    masks: bool = False
    evaluation: bool = False
    unique_ids: bool = True
    skips_empty: bool = False


@dataclass
class _Tally:
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


def check_annotations(path: str, where: str, categories: list[dict], use: Use) -> Problems:
    """What is wrong with the annotations and images of a COCO file, for a use of them.

    Raises:
        ValueError: the file is not a COCO file.
    """
    ids = [category.get("id") for category in categories]
    names = [category.get("name") for category in categories]
    doubled = [name for values in (ids, names) for name, n in Counter(values).items() if n > 1]
    if doubled:
        yield f"{where}.ann_file", f"{path!r}: categories share an id or a name: {doubled[:8]}"
        return
    learned = {c["id"] for c in categories if use.classes is None or c["name"] in use.classes}
    size = os.path.getsize(path)
    with (
        Progress(transient=True, disable=size < _SHOWS_PROGRESS) as progress,
        CocoFile(path, _counter(progress, f"checking {Path(path).name}", size)) as file,
    ):
        images = _Images(file)
        annotations = _Annotations(use, images, set(ids), learned)
        annotations.read(file)
    shown = images.shown if use.skips_empty else None
    looked_at = images.look(use.folder, shown) if use.folder is not None else 0
    yield from _report(path, where, use, images.tally, annotations, looked_at)


def _counter(progress: Progress, title: str, size: int) -> Any:
    task = progress.add_task(title, total=size)
    return lambda read: progress.advance(task, read)


def _report(
    path: str, where: str, use: Use, images: _Tally, annotations: _Annotations, looked_at: int
) -> Problems:
    tally, place = annotations.tally, f"{where}.ann_file"
    refused = {key: text.format(folder=use.folder) for key, text in _IMAGES_REFUSED.items()}
    opened = {"unreadable": refused.pop("unreadable")}
    for sentence in (
        *images.sentences("images", refused),
        *images.sentences("images that were opened", opened, looked_at),
        *tally.sentences("annotations", _REFUSED),
    ):
        yield place, f"{path!r}: {sentence}"
    warned = dict(_WARNED)
    if annotations.are_corners and (use.training or use.evaluation):
        warned.pop("reaches out")
        yield (
            place,
            f"{path!r}: its boxes look like x1, y1, x2, y2, as {tally.count('reaches out')} of "
            f"{tally.total} would reach outside their image: COCO's are x, y, width, height",
        )
    used_up = not annotations.usable and not tally.count(*_REFUSED)
    for sentence in (
        *tally.sentences("annotations", warned),
        *images.sentences("images that were opened", _IMAGES_WARNED, looked_at),
    ):
        warnings.warn(f"{place}: {path!r}: {sentence}.", stacklevel=2)
    if used_up and (use.training or use.evaluation):
        purpose = "train on" if use.training else "compare predictions with"
        which = f"none of its {tally.total} annotations is left" if tally.total else "no annotation"
        left_out = "; ".join(tally.sentences("annotations", warned))
        yield (
            place,
            f"{path!r}: {which} to {purpose}{': ' * bool(left_out)}{left_out}",
        )


class _Images:
    """The images that a file lists.

    Attributes:
        sizes: width and height by id.
        files: names by id.
        shown: the ids of those that have something to learn.
    """

    def __init__(self, file: CocoFile) -> None:
        self.tally = _Tally()
        self.sizes: dict[Any, tuple[float, float]] = {}
        self.files: dict[Any, str] = {}
        self.shown: set = set()
        for image in file.objects("images", "file_name"):
            self.tally.total += 1
            name = image.get("file_name", image.get("id"))
            if not {"id", "file_name", "width", "height"} <= image.keys():
                self.tally.add("no key", name)
                continue
            key, size = image["id"], (image["width"], image["height"])
            if not all(isinstance(side, (int, float)) and side > 0 for side in size):
                self.tally.add("no size", name)
                continue
            if key in self.sizes:
                self.tally.add("same id", name)
            self.sizes[key], self.files[key] = size, name

    def look(self, folder: str, only: set | None) -> int:
        """Look at the files of all images, or of some, and return how many were opened."""
        there = []
        for key, name in self.files.items():
            if only is None or key in only:
                try:
                    empty = os.stat(os.path.join(folder, name)).st_size == 0
                except OSError:
                    self.tally.add("no file", name)
                    continue
                if empty:
                    self.tally.add("no content", name)
                else:
                    there.append(key)
        opened = there[:: max(1, len(there) // _IMAGES_OPENED)]
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
        except (OSError, SyntaxError):
            self.tally.add("unreadable", self.files[key])
            return
        if self.sizes[key] == (height, width) != (width, height):
            self.tally.add("swapped", self.files[key])
        elif self.sizes[key] != (width, height):
            self.tally.add("other size", self.files[key])


class _Annotations:
    """What was found in annotations.

    Attributes:
        usable: how many can be learned from.
        fit_as_corners: how many boxes lie in their image if they are x1, y1, x2, y2.
        boxes: how many boxes have an image.
    """

    def __init__(self, use: Use, images: _Images, categories: set, learned: set) -> None:
        self.use, self.images, self.categories, self.learned = use, images, categories, learned
        self.tally = _Tally()
        self.usable = self.fit_as_corners = self.boxes = 0
        self._ids: set = set()

    @property
    def are_corners(self) -> bool:
        """Whether boxes are x1, y1, x2, y2.

        All lie in their image that way, and many do not as x, y, width, height.
        """
        outside = self.tally.count("reaches out")
        return self.fit_as_corners == self.boxes and outside >= max(2, self.boxes / 5)

    def read(self, file: CocoFile) -> None:
        """Look at each annotation of a file."""
        # A file without any is right for a test set that has no ground truth.
        fields = ("image_id", "bbox", "category_id", "id")
        for annotation in file.objects("annotations", *fields, required=False):
            self._add(annotation)

    def _add(self, annotation: dict) -> None:
        tally, name = self.tally, annotation.get("id")
        tally.total += 1
        if name is None:
            tally.add("no id", tally.total - 1)
        elif name in self._ids and self.use.unique_ids:
            tally.add("same id", name)
        self._ids.add(name)
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if image is None or category is None:
            tally.add("no image_id" if image is None else "no category_id", name)
            return
        if image not in self.images.sizes:
            tally.add("unknown image", name)
            return
        if category not in self.categories:
            tally.add("unknown category", name)
            return
        if category in self.learned:
            self.images.shown.add(image)
        else:
            tally.add("other class", name)
        if self.use.evaluation and category in self.learned:
            if "iscrowd" not in annotation:
                tally.add("no iscrowd", name)
            if name == 0:
                tally.add("id 0", name)
        if annotation.get("ignore", False):
            return
        box, area = annotation.get("bbox"), annotation.get("area")
        if not _are_numbers(box, 4):
            tally.add("no bbox", name)
        elif not _are_numbers([area], 1):
            tally.add("no area", name)
        elif not all(map(math.isfinite, (*box, area))):
            tally.add("not finite", name)
        elif self._has_object(box, area, image, name) and category in self.learned:
            self.usable += 1
            if self.use.masks and not annotation.get("segmentation"):
                tally.add("no mask", name)

    def _has_object(self, box: list[float], area: float, image: Any, name: Any) -> bool:
        """Whether the toolbox takes a box for an object: CocoDataset.parse_data_info has this."""
        x, y, w, h = box
        width, height = self.images.sizes[image]
        if w < 1 or h < 1 or area <= 0:
            self.tally.add("negative" if w < 0 or h < 0 else "empty", name)
            return False
        self.boxes += 1
        self.fit_as_corners += x < w <= width + _TOLERANCE and y < h <= height + _TOLERANCE
        if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            self.tally.add("outside", name)
            return False
        low, t = min(x, y), _TOLERANCE
        if low < -t or x + w > width + t or y + h > height + t:
            self.tally.add("reaches out", name)
        return True


def _are_numbers(values: Any, count: int) -> bool:
    return (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(value, (int, float)) for value in values)
    )
