"""Checks of the data sets in a config: files and folders, and the classes that they declare."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from .annotations import Use, check_annotations
from .coco_file import CocoFile
from .nodes import Problems, each, is_local, missing_file, some, warn
from .tally import is_id

# How many of the listed images are looked for before the annotations are read: where none of them
# is there, the folder is wrong.
_IMAGES_LOOKED_FOR = 20


@dataclass(frozen=True)
class Data:
    """A data set as the config has it.

    Attributes:
        node: its config.
        where: the place in the config.
        kind: its class, None where the config names none that is registered.
        evaluators: the configs of what evaluates on it; empty where it is trained on.
        is_trained_on: whether it is.
    """

    node: Mapping
    where: str
    kind: type | None
    evaluators: Sequence[Mapping] = ()
    is_trained_on: bool = False

    @property
    def root(self) -> str:
        return self.node.get("data_root") or ""

    @property
    def ann_file(self) -> str | None:
        """Where its annotations are, if on this machine."""
        name = self.node.get("ann_file")
        if name and is_local(self.node, self.root, name):
            return os.path.join(self.root, name)
        return None

    @property
    def reads_coco_json(self) -> bool:
        """Whether it matches its classes with a COCO file's category names, as CocoDataset."""
        from mmdet.datasets import CocoDataset

        return getattr(self.kind, "load_data_list", None) is CocoDataset.load_data_list

    @property
    def classes(self) -> list[str] | None:
        """The names of its classes, where they are known before it is built."""
        classes = self._metainfo("classes")
        if isinstance(classes, str) and os.path.exists(classes):
            classes = [name for name in Path(classes).read_text().split("\n") if name]
        return None if classes is None or isinstance(classes, str) else list(classes)

    def number_of(self, argument: str) -> int | None:
        """What a head's argument of this name has to be; None where that is not known.

        Of a panoptic data set, heads that detect objects predict the things.
        """
        from mmdet.datasets.base_det_dataset import BaseDetDataset

        if self.kind is None or not issubclass(self.kind, BaseDetDataset) or self.classes is None:
            return None
        if argument == "num_stuff_classes":
            return len(self._metainfo("stuff_classes") or ())
        return len(self._metainfo("thing_classes") or self.classes)

    def _metainfo(self, key: str) -> Any:
        declared = getattr(self.kind, "METAINFO", None) or {}
        return (self.node.get("metainfo") or {}).get(key, declared.get(key))


def data_of(
    node: Any, where: str, evaluators: Sequence[Mapping] = (), is_trained_on: bool = False
) -> Iterator[Data]:
    """The data sets that read files, at the bottom of wrappers that repeat, balance or join."""
    from mmdet.registry import DATASETS

    if not isinstance(node, Mapping):
        return
    inner = [key for key in ("dataset", "datasets") if key in node]
    for key in inner:
        for child, place in each(node[key], f"{where}.{key}"):
            yield from data_of(child, place, evaluators, is_trained_on)
    if not inner:
        kind = node.get("type")
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        yield Data(node, where, kind, evaluators, is_trained_on)


def root_is_absent(data: Data) -> bool:
    """Whether paths of a data set are relative to a folder that is not there."""
    paths = [data.node.get("ann_file"), *(data.node.get("data_prefix") or {}).values()]
    uses_root = any(isinstance(path, str) and not os.path.isabs(path) for path in paths)
    local = data.root and is_local(data.node, data.root)
    return bool(local and uses_root and not Path(data.root).exists())


def dataset_problems(data: Data, read_annotations: bool = True) -> Problems:
    """What is wrong with a data set, but for what concerns the model.

    Args:
        data: the data set.
        read_annotations: whether to look at each annotation and image, and not at classes alone.
    """
    if data.kind is None and isinstance(name := data.node.get("type"), str):
        yield f"{data.where}.type", f"no dataset named {name!r} is registered"
        return
    if data.ann_file:
        yield from missing_file(data.ann_file, f"{data.where}.ann_file")
    images = None
    for key, prefix in (data.node.get("data_prefix") or {}).items():
        if not (isinstance(prefix, str) and is_local(data.node, data.root, prefix)):
            continue
        folder = os.path.join(data.root, prefix)
        if folder and not os.path.isdir(folder):
            yield f"{data.where}.data_prefix.{key}", f"no folder {folder!r}"
        elif key == "img":
            images = folder
    if data.ann_file and os.path.isfile(data.ann_file) and data.reads_coco_json:
        try:
            yield from _file_problems(data, images, read_annotations)
        except ValueError as error:
            yield (
                f"{data.where}.ann_file",
                f"{data.ann_file!r} is not a COCO annotation file: {error}",
            )


def _file_problems(data: Data, folder: str | None, read_annotations: bool) -> Problems:
    with CocoFile(data.ann_file) as file:
        if read_annotations:
            file.check_encoding()
        categories = list(file.objects("categories", "name"))
        images = [
            image.get("file_name")
            for image in islice(file.objects("images", "file_name"), _IMAGES_LOOKED_FOR)
        ]
    unusable = [
        c for c in categories if not (is_id(c.get("id")) and isinstance(c.get("name"), str))
    ]
    if unusable:
        yield (
            f"{data.where}.ann_file",
            f"{data.ann_file!r}: {len(unusable)} of {len(categories)} categories have no 'id' that "
            f"is a number or no 'name' that is a string: {some(unusable, 3)}",
        )
        return
    there = [isinstance(i, str) and os.path.exists(os.path.join(folder or "", i)) for i in images]
    if folder and not any(there):
        yield (
            f"{data.where}.data_prefix.img",
            f"the folder {folder!r} has none of the first {len(images)} images of "
            f"{data.ann_file!r}, such as {images[0]!r}",
        )
        folder = None
    problems = list(_class_problems(data, [category.get("name") for category in categories]))
    yield from problems
    if read_annotations and not problems:
        yield from check_annotations(data.ann_file, data.where, categories, _use(data, folder))


def _class_problems(data: Data, categories: list[str]) -> Problems:
    """Where the class list and the categories of the file do not fit."""
    place = f"{data.where}.metainfo.classes"
    declared = (data.node.get("metainfo") or {}).get("classes")
    if isinstance(declared, str) and data.classes is None:
        yield (
            place,
            "expected a tuple of names or a file that lists them, got the string "
            f"{declared!r} (a tuple of one name needs a comma: ({declared!r},))",
        )
    if data.classes is None:
        return
    unknown = [name for name in data.classes if name not in categories]
    if unknown:
        yield (
            place,
            f"{some(unknown)} not among the categories of {data.ann_file!r}, which has "
            f"{some(categories)}; set metainfo=dict(classes=(...)) to names in the file",
        )
    elif data.classes != [name for name in categories if name in set(data.classes)]:
        # Such a model trains and evaluates correctly, but labels count in the file's order.
        warn(
            f"{place} are not in the order of {data.ann_file!r}: pictures and per-class results "
            "will carry the wrong names.",
        )


def _use(data: Data, folder: str | None) -> Use:
    """What the data set's annotations are for."""
    steps = data.node.get("pipeline") or []
    of_type = {str(step.get("type")): step for step in steps if isinstance(step, Mapping)}
    filtered = {} if data.node.get("test_mode") else data.node.get("filter_cfg") or {}
    return Use(
        folder=folder if data.node.get("indices") is None else None,
        classes=data.classes,
        training=data.is_trained_on,
        masks=bool(of_type.get("LoadAnnotations", {}).get("with_mask"))
        or any("segm" in _as_list(e.get("metric")) for e in data.evaluators),
        evaluation=any(
            "CocoMetric" in str(e.get("type")) and not e.get("format_only") for e in data.evaluators
        ),
        unique_ids=getattr(data.kind, "ANN_ID_UNIQUE", True),
        skips_empty=data.is_trained_on and bool(filtered.get("filter_empty_gt")),
    )


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def category_order(path: str, classes: Sequence[str]) -> list[str]:
    """Classes as labels count them: in the order of the annotation file.

    Raises:
        ValueError: it is no COCO file.
    """
    with CocoFile(path) as file:
        names = [category.get("name") for category in file.objects("categories", "name")]
    return [name for name in names if name in list(classes)]
