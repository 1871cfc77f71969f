"""The sizes of a convolution on paper, and what its copies and products take."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..cases import Case
from .device import Device, Step

WARP = 32


@dataclass(frozen=True)
class Problem:
    """A modulated deformable convolution of NCHW tensors, one group and one offset group.

    `arithmetic` is a dtype or, for float32 whose products are computed so, ``"tf32"``.
    """

    batch: int
    channels: int
    out_channels: int
    positions: int  # of an input image
    pixels: int  # of an output image
    taps: int
    arithmetic: str

    @classmethod
    def of(cls, case: Case, arithmetic: str) -> "Problem":
        height, width = case.out_size
        return cls(
            case.batch,
            case.channels,
            case.out_channels,
            case.height * case.width,
            height * width,
            case.taps,
            arithmetic,
        )

    @property
    def dtype(self) -> str:
        return "float32" if self.arithmetic == "tf32" else self.arithmetic

    @property
    def element(self) -> int:
        """Bytes of an element."""
        return 4 if self.dtype == "float32" else 2

    @property
    def input(self) -> int:
        """Elements of the input, as of the other names here."""
        return self.batch * self.positions * self.channels

    @property
    def output(self) -> int:
        return self.batch * self.pixels * self.out_channels

    @property
    def weight(self) -> int:
        return self.out_channels * self.row

    @property
    def row(self) -> int:
        """Of the columns of one pixel."""
        return self.taps * self.channels

    @property
    def columns(self) -> int:
        return self.batch * self.pixels * self.row

    @property
    def samples(self) -> int:
        return self.batch * self.pixels * self.taps


def permuting_copy(name: str, size: float, launches: float = 1) -> Step:
    """A copy by torch of `size` bytes, read and written together, that changes the layout."""
    return Step(name, launches, permuted=size)


def moving(device: Device, name: str, size: float, moved: float, **more) -> Step:
    """A step that moves so many bytes of tensors of `size` bytes, which stay in L2 if they fit."""
    where = {"l2": moved} if device.resident(size) else {"memory": moved}
    return Step(name, **where, **more)


# Tiles that products are computed in, rows by columns, and the share of the full rate that the
# smaller ones reach: assumed. Sums are split into no more parts, and into none shorter.
_TILES = {(128, 128): 1.0, (128, 64): 0.85, (64, 64): 0.7}
_MOST_PARTS, _SHORTEST_PART = 16, 256


def product_time(device: Device, arithmetic: str, rows: int, columns: int, summands: int) -> float:
    """Microseconds of a product (rows × summands) · (summands × columns).

    Multiprocessors compute a tile each; those without one in the last round wait. The best tile and
    the best split of the sum are taken.
    """
    parts = range(1, max(1, min(_MOST_PARTS, summands // _SHORTEST_PART)) + 1)
    best = 0.0
    for (height, width), share in _TILES.items():
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        covered = rows * columns / (tiles * height * width)
        for split in parts:
            rounds = math.ceil(tiles * split / device.multiprocessors)
            full = tiles * split / (rounds * device.multiprocessors)
            best = max(best, share * covered * full * (1 if split == 1 else device.split))
    rate = device.flops[arithmetic] * device.product[arithmetic] * best
    return 2 * rows * columns * summands / rate


def even_parts(number: int, most: int) -> Iterator[int]:
    """`number` in as few parts of at most `most` as can be, as equal as can be."""
    part = math.ceil(number / math.ceil(number / max(most, 1)))
    for first in range(0, number, part):
        yield min(part, number - first)


@functools.cache
def distinct_sectors(element: int, std: float = 2.0) -> float:
    """Sectors of 32 bytes that a warp touches if each lane reads one element of a plane.

    The lanes have neighbouring pixels, moved by offsets ~ N(0, std²) in both directions: the
    number that is expected.
    """

    def steps(center: int, reach: int) -> dict[int, float]:
        def below(x: float) -> float:
            return (1 + math.erf(x / (std * math.sqrt(2)))) / 2

        return {center + i: below(i + 1) - below(i) for i in range(-reach, reach)}

    reach = math.ceil(5 * std)
    in_sector = 32 // element
    missed: dict[tuple[int, int], float] = {}  # the probability that no lane touches a sector
    for lane in range(WARP):
        across: dict[int, float] = {}
        for x, probability in steps(lane, reach).items():
            across[x // in_sector] = across.get(x // in_sector, 0.0) + probability
        for y, down in steps(0, reach).items():
            for sector, probability in across.items():
                missed[y, sector] = missed.get((y, sector), 1.0) * (1 - down * probability)
    return sum(1 - probability for probability in missed.values())
