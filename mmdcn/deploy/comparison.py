"""How results in another runtime compare with PyTorch's: raw outputs, and detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .refusals import ExportError

__all__ = [
    "HALF",
    "LEAST_MATCHED",
    "PIXELS",
    "SINGLE",
    "TOLERANCE",
    "LargestError",
    "Matches",
    "Tolerance",
    "match",
]

#: Distance of raw outputs, relative to the largest element of each output (or to 1, where that is
#: smaller), up to which they are the same.
TOLERANCE = 1e-4

#: Distance of two boxes' sides, in pixels, up to which they are the same.
PIXELS = 0.01
#: Distance of their scores, and of probabilities in a mask, up to which they are the same.
PROBABILITY = 1e-3
#: The part of detections that must be the same: where scores or overlaps are equal but for
#: rounding, another box may come out of suppression, or be the last that there is place for.
LEAST_MATCHED = 0.99


@dataclass(frozen=True)
class Tolerance:
    """How far results may be apart that are the same, by the precision of the file.

    Attributes:
        raw: distance of raw outputs, see :data:`TOLERANCE`.
        pixels: distance of two boxes' sides.
        probability: distance of their scores, and of probabilities in a mask.
        least_matched: the part of detections that must be the same.
    """

    raw: float = TOLERANCE
    pixels: float = PIXELS
    probability: float = PROBABILITY
    least_matched: float = LEAST_MATCHED


SINGLE = Tolerance()
#: Of a file with layers in float16, which has eleven bits. What it is worth is its AP.
HALF = Tolerance(raw=2e-2, pixels=1.0, probability=0.02, least_matched=0.9)


def match(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    pixels: float = PIXELS,
    probability: float = PROBABILITY,
) -> Tensor:
    """Which detection of the one result is which of the other, in one image.

    Args:
        expected: boxes (K, 4), scores (K,), labels (K,), and perhaps masks (K, height, width).
        actual: the same of the other result, with another K perhaps.
        pixels: how far the sides of a box may be off.
        probability: how far its score may be, and the probabilities in its mask.

    Returns:
        For each expected detection the index of its counterpart, which is no other's, or -1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [5.0, 5.0, 9.0, 9.0]])
        >>> scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([1, 0])
        >>> match((boxes, scores, labels), (boxes[1:], scores[1:], labels[1:]))
        tensor([-1,  0])
    """
    far = (expected[0][:, None] - actual[0][None]).abs().amax(dim=2) > pixels
    far |= (expected[1][:, None] - actual[1][None]).abs() > probability
    far |= expected[2][:, None] != actual[2][None]
    found = torch.full((len(expected[0]),), -1)
    for index, row in enumerate(far.tolist()):
        for other, is_far in enumerate(row):
            if is_far or other in found:
                continue
            masks = [own[3:] for own in (expected, actual)]
            if all(_near(one[index], two[other], probability) for one, two in zip(*masks)):
                found[index] = other
                break
    return found


def _near(one: Tensor, two: Tensor, distance: float) -> bool:
    return bool((one - two).abs().max() <= distance)


def _check_shape(name: str, expected: Tensor, actual: Tensor) -> None:
    if actual.shape != expected.shape:
        raise ExportError(
            f"{name}: expected shape {tuple(expected.shape)} as in PyTorch, got "
            f"{tuple(actual.shape)}"
        )


@dataclass
class LargestError:
    """How far outputs are apart.

    Attributes:
        largest_error: over all outputs and images, relative to the largest element of the output
            in PyTorch, or to 1 where that is smaller.
        output: the name of the output that has it.
        tolerance: how far they may be.
    """

    largest_error: float = 0.0
    output: str = "all outputs"
    tolerance: Tolerance = SINGLE

    def add(
        self, names: Sequence[str], expected: Sequence[Tensor], actual: Sequence[Tensor]
    ) -> None:
        """Compare the outputs for a batch.

        Raises:
            ExportError: an output is farther off than the tolerance, or of another shape.
        """
        for name, one, other in zip(names, expected, actual):
            _check_shape(name, one, other)
            error = float((other - one).abs().max() / one.abs().max().clamp(min=1.0))
            # `>` would not do, as the error may be NaN.
            if not error <= self.tolerance.raw:
                raise ExportError(
                    f"{name}: expected onnxruntime's result within {self.tolerance.raw} of "
                    f"PyTorch's, got an error of {error:.2g}"
                )
            if error >= self.largest_error:
                self.largest_error, self.output = error, name

    def check(self) -> None:
        """Nothing is left to be checked when all batches have been."""

    def __str__(self) -> str:
        return f"largest error: {self.largest_error:.1e} of the largest element ({self.output})"


@dataclass
class Matches:
    """How many detections are the same in two results.

    Attributes:
        matched: detections of both.
        detections: those of the result that has more, image by image.
        tolerance: how far those may be apart that are the same, and how many must be.
    """

    matched: int = 0
    detections: int = 0
    tolerance: Tolerance = SINGLE

    def add(
        self, names: Sequence[str], expected: Sequence[Tensor], actual: Sequence[Tensor]
    ) -> None:
        """Compare the outputs for a batch.

        Raises:
            ExportError: shapes are other than expected.
        """
        for name, one, other in zip(names, expected, actual):
            _check_shape(name, one, other)
        for image in range(len(expected[0])):
            ours, theirs = (
                [output[image][outputs[1][image] > 0] for output in outputs]
                for outputs in (expected, actual)
            )
            near = self.tolerance.pixels, self.tolerance.probability
            self.matched += int((match(ours, theirs, *near) >= 0).sum())
            self.detections += max(len(ours[0]), len(theirs[0]))

    def check(self) -> None:
        """Raise ExportError where fewer of all are the same than must be."""
        least = self.tolerance.least_matched
        if self.matched < least * self.detections:
            raise ExportError(
                f"expected {least:.0%} of the detections as in PyTorch, within "
                f"{self.tolerance.pixels} pixels, got {self}. Where scores are equal, as of a "
                "model that is hardly trained, rounding chooses among boxes: export a trained one, "
                "compare on other --images, or leave out the comparison by --no-verify"
            )

    def __str__(self) -> str:
        return (
            f"{self.matched} of {self.detections} detections within {self.tolerance.pixels} pixels"
        )
