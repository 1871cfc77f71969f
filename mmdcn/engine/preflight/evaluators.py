"""Checks of the files that predictions are compared with: whether they are of the same data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from .coco_file import CocoFile
from .dataset import Data
from .nodes import Problems, is_local, some
from .tally import is_id


def evaluator_problems(
    data_sets: Sequence[Data], evaluators: Sequence[tuple[Mapping, str]]
) -> Problems:
    """Where the annotation file of an evaluator is of other images or classes than its data.

    Args:
        data_sets: all of one stage, which have been checked.
        evaluators: those of the stage, with their places.
    """
    if not data_sets or not all(data.reads_coco_json and data.ann_file for data in data_sets):
        return
    for metric, where in evaluators:
        path = ground_truth_of(metric)
        if path is None or not os.path.isfile(path):
            continue
        place = f"{where}.ann_file"
        try:
            yield from _other_data(data_sets, path, place, bool(metric.get("format_only")))
        except ValueError as error:
            yield place, f"{path!r} is not a COCO annotation file: {error}"


def ground_truth_of(metric: Mapping) -> str | None:
    """The local file that COCO's metric compares predictions with; None of other metrics."""
    path = metric.get("ann_file")
    is_coco = "CocoMetric" in str(metric.get("type")) and isinstance(path, str)
    return path if is_coco and is_local(metric, path) else None


def _other_data(data_sets: Sequence[Data], path: str, place: str, format_only: bool) -> Problems:
    with CocoFile(path) as file:
        categories = [category.get("name") for category in file.objects("categories", "name")]
    absent = [name for name in data_sets[0].classes or () if name not in categories]
    if absent:
        yield (
            place,
            f"{path!r} has no categories {some(absent)}, which are classes of "
            f"{data_sets[0].where}: it belongs to other data",
        )
        return
    if format_only:
        return
    partial = [data for data in data_sets if data.node.get("indices") is not None]
    for data in partial:
        taken, total = _number_taken(data.node["indices"]), len(_image_ids(data.ann_file))
        if taken < total:
            yield (
                place,
                f"{data.where} takes {taken} of {total} images (indices), and all others of "
                f"{path!r} would count as missed: leave out indices, and give both a file of those "
                "images alone",
            )
    if partial or all(os.path.samefile(data.ann_file, path) for data in data_sets):
        return
    own = set().union(*(_image_ids(data.ann_file) for data in data_sets))
    compared = _image_ids(path)
    names = " and ".join(repr(data.ann_file) for data in data_sets)
    for extra, total, of, other, means in (
        (own - compared, own, names, repr(path), "have nothing to be compared with"),
        (compared - own, compared, repr(path), names, "would count as missed"),
    ):
        if extra:
            yield (
                place,
                f"{len(extra)} of the {len(total)} images of {of} are not in {other}, by their "
                f"'id', and {means}: set both to the same file",
            )
            return


def _image_ids(path: str) -> set:
    with CocoFile(path) as file:
        ids = (image.get("id") for image in file.objects("images", "file_name"))
        return {one for one in ids if is_id(one)}


def _number_taken(indices: Any) -> int:
    return abs(indices) if isinstance(indices, int) else len(indices)
