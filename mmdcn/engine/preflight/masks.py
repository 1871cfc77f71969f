"""Checks of one annotation's mask, before pycocotools is given it: it hangs or crashes on some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .tally import are_numbers

_CORNERS = 3
# pycocotools walks along the outline of a polygon, and needs memory for every step.
_FARTHEST = 100  # widths or heights of the image

REFUSED = {
    "no mask": "have no 'segmentation', which LoadAnnotations(with_mask=True) and the evaluation "
    "of masks read",
    "bad mask": "have a 'segmentation' that is neither a list of polygons, [[x, y, x, y, …], …], "
    "nor RLE, {'counts': …, 'size': [height, width]}",
    "mask not finite": "have a polygon with a number that is NaN, infinite or far outside their "
    "image",
    "mask of another size": "have an RLE 'segmentation' whose 'size' is not [height, width] of "
    "their image",
    "bad counts": "have an RLE 'segmentation' whose 'counts' do not add up to its 'size'",
    "first polygon": "begin with a polygon of fewer than 6 numbers, which COCO's evaluation does "
    "not take",
}
WARNED = {
    "short polygon": "have a polygon of fewer than 6 numbers or of an odd number, which is left "
    "out, and with it the object that has no other",
}


def look_at_mask(
    segmentation: Any, size: tuple[float, float], is_evaluated: bool
) -> tuple[str | None, bool]:
    """What is to be said of a mask, and whether an object is left of it.

    Args:
        segmentation: what an annotation has.
        size: width and height of the image.
        is_evaluated: whether COCO's evaluation reads it, or training.
    """
    if not segmentation:
        return "no mask", False
    if isinstance(segmentation, dict):
        finding = _look_at_rle(segmentation, size)
        return finding, finding is None
    if not isinstance(segmentation, list) or not all(
        isinstance(polygon, list) and are_numbers(polygon, len(polygon)) for polygon in segmentation
    ):
        return "bad mask", False
    limit = _FARTHEST * max(size)
    if not all(math.isfinite(v) and abs(v) <= limit for p in segmentation for v in p):
        return "mask not finite", False
    whole = [len(p) >= 2 * _CORNERS and len(p) % 2 == 0 for p in segmentation]
    if is_evaluated and len(segmentation[0]) < 2 * _CORNERS:
        return "first polygon", False
    return None if all(whole) else "short polygon", any(whole)


def _look_at_rle(rle: dict, size: tuple[float, float]) -> str | None:
    counts = rle.get("counts")
    if not isinstance(counts, (list, str)) or not are_numbers(rle.get("size"), 2):
        return "bad mask"
    if list(rle["size"]) != [size[1], size[0]]:
        return "mask of another size"
    runs = _decompress(counts) if isinstance(counts, str) else _whole(counts)
    if runs is None or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        return "bad counts"
    return None


def _whole(counts: Sequence[Any]) -> np.ndarray | None:
    return np.array(counts, np.int64) if all(type(n) is int for n in counts) else None


def _decompress(text: str) -> np.ndarray | None:
    """The lengths of the runs in COCO's compressed text; None where it is not that.

    Five bits a character, least first; a sixth says that more follow, and the last fifth is the
    sign. From the fourth on, a number is the difference to the one two places before.
    """
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if codes.min() < 0 or codes.max() > 0x3F or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 12:
        return None  # more than 60 bits
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 0x1F) << shifts, starts)
    negative = (codes[ends] & 0x10) != 0
    numbers -= negative.astype(np.int64) << (5 * lengths)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers
