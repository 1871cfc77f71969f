"""Checks of the annotations in a COCO file, and of the images that it lists.

What the toolbox would leave out or train on all the same is warned of; what would stop a run or
spoil what it learns is refused. Both come with a count, and the first few named.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from . import images as listed
from . import masks
from .coco_file import CocoFile
from .images import Images
from .nodes import Problems, warn
from .tally import Tally, are_numbers, is_id

_SHOWS_PROGRESS = 50e6  # bytes of a file that takes more than a second
_MANY_CROWDS = 0.05  # of the objects that are learned; 0.01 in COCO
_TOLERANCE = 1.0  # pixels by which a box may reach outside, as labels are rounded

_REFUSED = {
    "no id": "have no 'id' that is a number",
    "same id": "have an 'id' that an earlier one has",
    "no image_id": "have no 'image_id' that is a number",
    "no category_id": "have no 'category_id' that is a number",
    "other kind of image_id": "have an 'image_id' in quotes, and the 'id' of that image is a "
    "number, or the other way round: numbers are expected",
    "other kind of category_id": "have a 'category_id' in quotes, and the 'id' of that category "
    "is a number, or the other way round: numbers are expected",
    "no bbox": "have no 'bbox' of four numbers x, y, width and height",
    "not finite": "have a 'bbox' or 'area' that is NaN or infinite",
    "no area": "have no 'area' that is a number: width * height of the box would do",
    "no iscrowd": "have no 'iscrowd' of 0 or 1, which COCO's evaluation reads: 0 would do",
    "iscrowd in quotes": "have an 'iscrowd' that is no number, and would count as 1: 0 or 1 is "
    "expected",
    **masks.REFUSED,
}
_WARNED = {
    "unknown image": "belong to no image of the file and are left out",
    "unknown category": "have a 'category_id' that no category has, and are left out",
    "other class": "are of categories that the class list lacks, and are left out",
    "negative": "have a negative width or height and are left out",
    "empty": "have a width, a height or an area below 1 or of 0 and are left out",
    "outside": "lie outside their image and are left out",
    "reaches out": "reach outside their image by more than a pixel, and are used as they are",
    "crowd": "have iscrowd=1 and are not learned",
    "id 0": "have the 'id' 0, whose match COCO's evaluation counts as none",
    **masks.WARNED,
}


@dataclass(frozen=True)
class Use:
    """What annotations are for.

    Attributes:
        folder: of the images, None where they cannot be looked at.
        classes: names of those that are learned, None where all are.
        training: whether a model is trained on them.
        masks: whether their masks are loaded, or evaluated.
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
        images = Images(file)
        annotations = _Annotations(use, images, set(ids), learned)
        annotations.read(file)
    shown = images.shown if use.skips_empty else None
    looked_at = images.look(use.folder, shown) if use.folder is not None else 0
    yield from _report(path, where, use, images.tally, annotations, looked_at)


def _counter(progress: Progress, title: str, size: int) -> Any:
    task = progress.add_task(title, total=size)
    return lambda read: progress.advance(task, read)


def _report(
    path: str, where: str, use: Use, images: Tally, annotations: _Annotations, looked_at: int
) -> Problems:
    tally, place = annotations.tally, f"{where}.ann_file"
    refused = {key: text.format(folder=use.folder) for key, text in listed.REFUSED.items()}
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
    if annotations.are_fractions and (use.training or use.evaluation):
        warned.pop("empty")
        yield (
            place,
            f"{path!r}: its boxes look like fractions of their image's width and height, as none "
            f"of {tally.total} goes beyond 1: COCO's are in pixels",
        )
        return
    if not use.training or tally.count("crowd") < _MANY_CROWDS * annotations.usable:
        warned.pop("crowd")
    is_refused = tally.count(*_REFUSED) or images.count(*listed.REFUSED)
    used_up = not annotations.usable and not is_refused
    for sentence in (
        *tally.sentences("annotations", warned),
        *images.sentences("images that were opened", listed.WARNED, looked_at),
    ):
        warn(f"{place}: {path!r}: {sentence}.")
    if used_up and (use.training or use.evaluation):
        purpose = "train on" if use.training else "compare predictions with"
        which = f"none of its {tally.total} annotations is left" if tally.total else "no annotation"
        left_out = "; ".join(tally.sentences("annotations", _WARNED))
        yield (
            place,
            f"{path!r}: {which} to {purpose}{': ' * bool(left_out)}{left_out}",
        )


class _Annotations:
    """What was found in annotations.

    Attributes:
        usable: how many can be learned from.
        fit_as_corners: how many boxes lie in their image if they are x1, y1, x2, y2.
        fit_as_fractions: how many of all do if they are fractions of it.
        boxes: how many boxes have an image.
    """

    def __init__(self, use: Use, images: Images, categories: set, learned: set) -> None:
        self.use, self.images, self.categories, self.learned = use, images, categories, learned
        self.tally = Tally()
        self.usable = self.fit_as_corners = self.fit_as_fractions = self.boxes = 0
        self._ids: set = set()

    @property
    def are_corners(self) -> bool:
        """Whether boxes are x1, y1, x2, y2.

        All lie in their image that way, and many do not as x, y, width, height.
        """
        outside = self.tally.count("reaches out")
        return self.fit_as_corners == self.boxes and outside >= max(2, self.boxes / 5)

    @property
    def are_fractions(self) -> bool:
        """Whether boxes are fractions of their image, as in the format of YOLO."""
        return 2 <= self.fit_as_fractions == self.tally.total

    def read(self, file: CocoFile) -> None:
        """Look at each annotation of a file."""
        # A file without any is right for a test set that has no ground truth.
        fields = ("image_id", "bbox", "category_id", "id")
        for annotation in file.objects("annotations", *fields, required=False):
            self._add(annotation)

    def _add(self, annotation: dict) -> None:
        tally, name = self.tally, annotation.get("id")
        tally.total += 1
        if not is_id(name):
            tally.add("no id", tally.total - 1)
            return
        if name in self._ids and self.use.unique_ids:
            tally.add("same id", name)
        self._ids.add(name)
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not self._is_placed(image, category, name):
            return
        if category in self.learned:
            self.images.shown.add(image)
        else:
            tally.add("other class", name)
        self._look_at_crowd(annotation.get("iscrowd"), category in self.learned, name)
        if category in self.learned and self.use.evaluation and name == 0:
            tally.add("id 0", name)
        if annotation.get("ignore", False):
            return
        box, area = annotation.get("bbox"), annotation.get("area")
        if not are_numbers(box, 4):
            tally.add("no bbox", name)
        elif not are_numbers([area], 1):
            tally.add("no area", name)
        elif not all(map(math.isfinite, (*box, area))):
            tally.add("not finite", name)
        elif category in self.learned:
            self._look_at_object(annotation, image, name)
        else:
            self._has_object(box, area, image, name)

    def _is_placed(self, image: Any, category: Any, name: Any) -> bool:
        """Whether an annotation's image and category are there."""
        for key, value, known in (
            ("image", image, self.images.sizes),
            ("category", category, self.categories),
        ):
            if not is_id(value):
                what = f"no {key}_id"
            elif value in known:
                continue
            elif key == "image" and value in self.images.refused:
                return False  # said of the image
            elif _in_quotes_or_not(value) in known:
                what = f"other kind of {key}_id"
            else:
                what = f"unknown {key}"
            self.tally.add(what, name)
            return False
        return True

    def _look_at_crowd(self, value: Any, is_learned: bool, name: Any) -> None:
        is_number = isinstance(value, (int, float))
        if self.use.evaluation and is_learned and not is_number:
            self.tally.add("no iscrowd", name)
        elif value and not is_number:
            self.tally.add("iscrowd in quotes", name)

    def _look_at_object(self, annotation: dict, image: Any, name: Any) -> None:
        """Look at the box and the mask of an annotation of a class that is learned."""
        found = self._has_object(annotation["bbox"], annotation["area"], image, name)
        if self.use.masks and (found or self.use.evaluation):
            finding, is_left = masks.look_at_mask(
                annotation.get("segmentation"), self.images.sizes[image], self.use.evaluation
            )
            if finding is not None:
                self.tally.add(finding, name)
            found = found and is_left
        if found and annotation.get("iscrowd"):
            self.tally.add("crowd", name)
        elif found:
            self.usable += 1

    def _has_object(self, box: list[float], area: float, image: Any, name: Any) -> bool:
        """Whether the toolbox takes a box for an object: CocoDataset.parse_data_info has this."""
        x, y, w, h = box
        width, height = self.images.sizes[image]
        self.fit_as_fractions += min(w, h) > 0 and min(x, y) >= 0 and max(box) <= 1
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


def _in_quotes_or_not(value: Any) -> Any:
    """The same id as a number where it is a string, and the other way round."""
    if not isinstance(value, str):
        return str(value)
    try:
        return int(value)
    except ValueError:
        return None
