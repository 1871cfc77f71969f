"""Parameters of the warped shapes: everything that the images and their annotations depend on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameters:
    """Everything the data depend on.

    Args:
        seed: each image is drawn from (seed, split, index) alone, so asking for more images leaves
            the earlier ones as they were.
        train_images: images in ``train``.
        val_images: images in ``val`` and in each ``val_s<strength>``.
        image_size: height and width in pixels.
        min_instances: fewest instances per image.
        max_instances: most instances per image; fewer are drawn where they find no room.
        min_size: longest side of an unwarped instance's box, as a fraction of the image size;
            a warped instance has the area of the unwarped one.
        max_size: likewise, the upper bound.
        strength: strength of the warps in ``train`` and ``val``; 0 leaves the shapes undistorted.
        strengths: one more set for each, the scenes of ``val`` at this strength: the same
            backgrounds and the same shapes in the same sizes, each in the first of its places
            that is free for the shape it now has.

    Raises:
        ValueError: a value is out of its range.

    Example:
        >>> [split.name for split in Parameters(strengths=(0, 2)).splits()]
        ['train', 'val', 'val_s0.0', 'val_s2.0']
    """

    seed: int = 0
    train_images: int = 2000
    val_images: int = 200
    image_size: int = 192
    min_instances: int = 2
    max_instances: int = 5
    min_size: float = 0.17
    max_size: float = 0.6
    strength: float = 1.0
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)

    def __post_init__(self):
        for name in ("seed", "strength"):
            _check(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("train_images", "val_images", "min_instances"):
            _check(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _check(self.image_size >= 32, "image_size", "at least 32 pixels", self.image_size)
        _check(
            self.max_instances >= self.min_instances,
            "max_instances",
            f"at least min_instances ({self.min_instances})",
            self.max_instances,
        )
        _check(
            0 < self.min_size <= self.max_size <= 1,
            "min_size and max_size",
            "fractions of the image size, 0 < min_size <= max_size <= 1",
            (self.min_size, self.max_size),
        )
        _check(
            all(strength >= 0 for strength in self.strengths)
            and len(set(self.strengths)) == len(self.strengths),
            "strengths",
            "distinct and at least 0",
            self.strengths,
        )

    def splits(self) -> list["Split"]:
        """The sets to make: train, val, and val at each of the strengths."""
        val = [Split("val", 1, self.val_images, self.strength)]
        val += [Split(f"val_s{float(s)}", 1, self.val_images, s) for s in self.strengths]
        return [Split("train", 0, self.train_images, self.strength), *val]


@dataclass(frozen=True)
class Split:
    """One set of images.

    Args:
        name: the name of its image folder and its annotation file.
        stream: sets with the same stream show the same scenes.
        num_images: how many.
        strength: strength of the warps.

    Example:
        >>> Parameters(val_images=50, strength=2.0).splits()[1]
        Split(name='val', stream=1, num_images=50, strength=2.0)
    """

    name: str
    stream: int
    num_images: int
    strength: float


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")
