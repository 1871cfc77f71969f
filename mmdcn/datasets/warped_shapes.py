"""Warped shapes: a detection data set in COCO format, made on the spot from a seed.

Images of textured shapes and glyphs on cluttered backgrounds, every instance bent by a random
affine, projective or elastic warp of a set strength. Colour and texture are drawn without regard to
the class.
The module needs NumPy, OpenCV, shapely and rich, but neither PyTorch nor the detection toolbox.
"""

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import shapely
from rich.progress import track

from .warps import KINDS, Warp, draw_warp

# Part of the manifest: raise it with every change of what the generator draws.
VERSION = 1

MANIFEST = "manifest.json"
CONTACT_SHEET = "contact_sheet.png"


def _glyph(strokes: Sequence[tuple[float, float, float, float]]) -> np.ndarray:
    """The outline of axis-parallel bars, each (left, top, right, bottom)."""
    outline = shapely.union_all([shapely.box(*bar) for bar in strokes])
    return np.array(outline.exterior.coords)[:-1]


def _regular(num_points: int, radii: Sequence[float]) -> np.ndarray:
    """Points around the origin at equal angles, the first on top, at the radii in turn."""
    angles = np.arange(num_points) * 2 * np.pi / num_points - np.pi / 2
    radius = np.resize(radii, num_points)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


# Outline of each class, (P, 2) as (x, y) with y down, within the template square [-1, 1]². None is
# a warped copy of another, and each equals its own mirror image, left and right swapped, so that
# training images may be flipped.
TEMPLATES = {
    "disc": _regular(96, [1]),
    "triangle": _regular(3, [1]),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.9,
    "star": _regular(10, [1, 0.42]),
    "T": _glyph([(-0.9, -1, 0.9, -0.4), (-0.3, -1, 0.3, 1)]),
    "H": _glyph([(-0.9, -1, -0.35, 1), (0.35, -1, 0.9, 1), (-0.9, -0.27, 0.9, 0.27)]),
    "U": _glyph([(-0.9, -1, -0.3, 1), (0.3, -1, 0.9, 1), (-0.9, 0.4, 0.9, 1)]),
}
CLASSES = tuple(TEMPLATES)

# At least this share of an instance's area lies inside the image.
MIN_VISIBLE = 0.75
# Pixels between two instances. As these never overlap, every polygon is all of its instance.
MIN_GAP = 2.0
# Distance in RGB from an instance's main colour to the mean of the background under it.
MIN_CONTRAST = 90.0
# How far a texture goes from its main colour towards another random one.
TEXTURE_DEPTH = (0.2, 0.5)
PATCH_OPACITY = 0.6
PLACEMENT_TRIES = 30
# Annotated polygons stray from the true contour by at most this many pixels.
CONTOUR_TOLERANCE = 0.03
# OpenCV fills the pixels that the contour touches: a mask is half a fine pixel too wide all around.
SUPERSAMPLING = 8
JPEG_QUALITY = 95


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
    """

    name: str
    stream: int
    num_images: int
    strength: float


@dataclass(frozen=True)
class Instance:
    """One shape, placed in an image; continuous image coordinates, pixel i covers [i, i + 1].

    Args:
        label: index into ``CLASSES``.
        kind: the kind of the warp, one of ``warps.KINDS``.
        warp: from the template to the warped template.
        origin: (2,), the point of the warped template that lands on ``position``.
        scale: pixels per unit of the warped template.
        position: (2,), (x, y) in the image.
        outline: the whole contour in the image, parts beyond the border included.
    """

    label: int
    kind: str
    warp: Warp
    origin: np.ndarray
    scale: float
    position: np.ndarray
    outline: shapely.Polygon

    def to_template(self, points: np.ndarray) -> np.ndarray:
        """Map (..., 2) image points (x, y) to the template."""
        centred = (points - self.position.astype(points.dtype)) / self.scale
        return self.warp.inverse(centred + self.origin.astype(points.dtype))


@dataclass(frozen=True)
class Scene:
    """One image with what is in it.

    Args:
        image: (H, W, 3) uint8, BGR as OpenCV has it.
        instances: the shapes in it.
        masks: one (H, W) float32 per instance, the covered fraction of each pixel.
    """

    image: np.ndarray
    instances: list[Instance] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)


def generate(
    out_dir: str | Path, parameters: Parameters, overwrite: bool = False, progress: bool = True
) -> bool:
    """Write the data set: ``<split>/*.jpg``, ``annotations/<split>.json``, a contact sheet.

    All is written to a temporary folder beside ``out_dir`` and renamed when complete.

    Args:
        out_dir: the folder to make.
        parameters: what to draw.
        overwrite: replace a data set that this function made with other parameters.
        progress: show a progress bar.

    Returns:
        Whether anything was written; ``False`` where ``out_dir`` holds this very data set already.

    Raises:
        FileExistsError: ``out_dir`` holds something else.
    """
    out_dir = Path(out_dir)
    manifest = json.loads(
        json.dumps({"generator": __name__, "version": VERSION} | asdict(parameters))
    )
    found = _read_manifest(out_dir)
    if found == manifest:
        return False
    _refuse_to_replace(out_dir, found, manifest, overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        (made / "annotations").mkdir()
        for split in parameters.splits():
            _write_split(made, split, parameters, progress)
        (made / CONTACT_SHEET).write_bytes(_encode(".png", contact_sheet(made, parameters)))
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        made.rename(out_dir)
    return True


def _refuse_to_replace(out_dir: Path, found: dict | None, manifest: dict, overwrite: bool) -> None:
    """Raise FileExistsError for a folder that must stay as it is; `found` is its manifest."""
    if found is not None and not overwrite:
        differing = [k for k in manifest if found.get(k) != manifest[k]]
        raise FileExistsError(
            f"{out_dir} holds warped shapes made with other values of {', '.join(differing)}: "
            "overwrite it (--overwrite), or choose another directory"
        )
    if found is None and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(
            f"{out_dir} exists and was not made by this generator, so it is left alone: "
            "choose a directory that is empty or does not exist"
        )


def draw_scene(parameters: Parameters, split: Split, index: int) -> Scene:
    """Draw one image of a split."""
    size = parameters.image_size
    seed = [parameters.seed, split.stream, index]
    rng = np.random.default_rng(seed)
    image = _draw_background(rng, size)
    scene = Scene(image)
    for number in range(rng.integers(parameters.min_instances, parameters.max_instances + 1)):
        # A generator of its own, so that what one instance consumes changes no other.
        instance_rng = np.random.default_rng([*seed, number])
        instance = _place(instance_rng, parameters, split.strength, scene.instances)
        if instance is None:
            continue
        mask = rasterize(instance.outline, size)
        _paint(instance_rng, image, instance, mask)
        scene.instances.append(instance)
        scene.masks.append(mask)
    image += rng.standard_normal(image.shape, dtype=np.float32) * 4
    return Scene(_to_uint8(image), scene.instances, scene.masks)


def annotate(instance: Instance, image_size: int) -> dict:
    """The COCO fields of an instance, all three from the same polygons, clipped to the image.

    Returns:
        ``segmentation`` (the polygons), ``bbox`` (their tight box, x, y, width, height) and
        ``area`` (theirs), in pixels.
    """
    visible = shapely.intersection(instance.outline, shapely.box(0, 0, image_size, image_size))
    visible = shapely.simplify(visible, CONTOUR_TOLERANCE)
    parts = [part for part in shapely.get_parts(visible) if part.area > 0.5]
    polygons = [np.round(np.array(part.exterior.coords)[:-1], 2) for part in parts]
    points = np.concatenate(polygons)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return {
        "segmentation": [polygon.ravel().tolist() for polygon in polygons],
        "bbox": np.round([left, top, right - left, bottom - top], 2).tolist(),
        "area": round(sum(shapely.Polygon(polygon).area for polygon in polygons), 3),
    }


def rasterize(outline: shapely.Polygon, size: int) -> np.ndarray:
    """The covered fraction of each pixel: (size, size) float32 in [0, 1]."""
    # A window around the whole outline: OpenCV smears what lies outside of its canvas.
    bounds = np.array(outline.bounds)
    left, top = np.floor(bounds[:2]).astype(int).tolist()
    right, bottom = np.ceil(bounds[2:]).astype(int).tolist()
    width, height = right - left, bottom - top
    fine = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    # OpenCV has pixel centres on the integers, the outline has them on the halves.
    points = (np.array(outline.exterior.coords) - [left, top]) * SUPERSAMPLING - 0.5
    shift = 4  # fractional bits of the fixed-point coordinates that OpenCV takes
    cv2.fillPoly(fine, [np.round(points * 2**shift).astype(np.int32)], 255, shift=shift)
    covered = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA)
    mask = np.zeros((size, size), np.float32)
    inside = np.s_[max(0, -top) : size - top, max(0, -left) : size - left]
    mask[max(0, top) : bottom, max(0, left) : right] = covered[inside].astype(np.float32) / 255
    return mask


def contact_sheet(data_dir: Path, parameters: Parameters, columns: int = 6) -> np.ndarray:
    """The first images of every split with their boxes and labels: one row each, BGR uint8."""
    rows = []
    for split in parameters.splits():
        coco = json.loads((data_dir / "annotations" / f"{split.name}.json").read_text())
        tiles = []
        for image in coco["images"][:columns]:
            pixels = cv2.imread(str(data_dir / split.name / image["file_name"]))
            annotations = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
            tiles.append(_draw_annotations(pixels, annotations))
        blank = np.full_like(tiles[0], 255)
        tiles += [blank] * (columns - len(tiles))
        row = np.hstack([np.pad(t, ((0, 8), (0, 8), (0, 0)), constant_values=255) for t in tiles])
        caption = np.full((34, row.shape[1], 3), 255, np.uint8)
        text = f"{split.name}   {split.num_images} images, warps of strength {split.strength:g}"
        _put_text(caption, text, (2, 24), 0.7, (0, 0, 0))
        rows += [caption, row]
    return np.pad(np.vstack(rows), ((8, 8), (16, 8), (0, 0)), constant_values=255)


def _check(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")


def _read_manifest(data_dir: Path) -> dict | None:
    try:
        manifest = json.loads((data_dir / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(manifest, dict) and manifest.get("generator") == __name__
    return manifest if is_ours else None


def _write_split(data_dir: Path, split: Split, parameters: Parameters, progress: bool) -> None:
    (data_dir / split.name).mkdir()

    def write_image(index: int) -> list[dict]:
        scene = draw_scene(parameters, split, index)
        encoded = _encode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        (data_dir / split.name / f"{index:06d}.jpg").write_bytes(encoded)
        return [
            annotate(instance, parameters.image_size)
            | {"category_id": instance.label + 1, "iscrowd": 0, "warp": instance.kind}
            for instance in scene.instances
        ]

    images, annotations = [], []
    # The heavy work is inside NumPy and OpenCV, which let go of the interpreter lock.
    pool = ThreadPoolExecutor()
    try:
        drawn = track(
            pool.map(write_image, range(split.num_images)),
            f"warped shapes, {split.name}",
            total=split.num_images,
            disable=not progress,
        )
        for index, instances in enumerate(drawn):
            images.append(
                {
                    "id": index + 1,
                    "file_name": f"{index:06d}.jpg",
                    "width": parameters.image_size,
                    "height": parameters.image_size,
                }
            )
            for instance in instances:
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1} | instance)
    finally:
        pool.shutdown(cancel_futures=True)  # because an interruption should not wait
    coco = {
        "info": {"description": f"Warped shapes, {split.name}, strength {split.strength:g}"},
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    (data_dir / "annotations" / f"{split.name}.json").write_text(json.dumps(coco))


def _encode(extension: str, image: np.ndarray, options: Sequence[int] = ()) -> bytes:
    return cv2.imencode(extension, image, options)[1].tobytes()


def _to_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


# Shapes


def _place(
    rng: np.random.Generator, parameters: Parameters, strength: float, others: list[Instance]
) -> Instance | None:
    """Draw an instance and the first of its random positions that is free; None if none is."""
    image_size = parameters.image_size
    label = int(rng.integers(len(CLASSES)))
    kind = KINDS[rng.integers(len(KINDS))]
    # The size is uniform in the logarithm, so that small instances are as many as large ones.
    size = np.exp(rng.uniform(*np.log([parameters.min_size, parameters.max_size]))) * image_size
    positions = rng.uniform(0, image_size, (PLACEMENT_TRIES, 2))
    warp = draw_warp(rng, kind, strength)

    template = TEMPLATES[CLASSES[label]]
    contour = shapely.Polygon(warp.forward(_densify(template)))
    if not contour.is_valid:
        return None
    longest_side = np.ptp(template, axis=0).max()
    scale = size / longest_side * np.sqrt(shapely.Polygon(template).area / contour.area)
    origin = shapely.get_coordinates(contour.centroid)[0]
    shape = (np.array(contour.exterior.coords) - origin) * scale
    frame = shapely.box(0, 0, image_size, image_size)
    taken = shapely.union_all([other.outline.buffer(MIN_GAP) for other in others])
    for position in positions:
        outline = shapely.Polygon(shape + position)
        visible = shapely.intersection(outline, frame).area / outline.area
        if visible >= MIN_VISIBLE and not outline.intersects(taken):
            return Instance(label, kind, warp, origin, scale, position, outline)
    return None


def _densify(outline: np.ndarray, spacing: float = 0.03) -> np.ndarray:
    """Points along a closed outline, (P, 2), at most ``spacing`` apart, the corners among them."""
    ring = shapely.LinearRing(outline)
    return np.array(shapely.segmentize(ring, spacing).coords)[:-1]


# Pixels


def _draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft colours, patches of texture and scribbles: (size, size, 3) float32."""
    image = _smooth_noise(rng, size, 4, 3) * 150 + 50
    for _ in range(rng.integers(2, 5)):
        patch = _smooth_noise(rng, size, int(rng.integers(4, 9)))
        alpha = np.clip((patch - rng.uniform(0.5, 0.7)) * 12, 0, 1) * PATCH_OPACITY
        texture = _texture(rng, _pixel_grid(size, size) / size * 8)
        image += alpha * (_blend(_color(rng), _color(rng), texture) - image)
    canvas = _to_uint8(image)
    for _ in range(rng.integers(6, 16)):
        # A random walk with a slowly turning heading.
        turns = np.cumsum(rng.normal(0, 0.5, int(rng.integers(2, 12)))) + rng.uniform(0, 2 * np.pi)
        steps = rng.uniform(0.02, 0.1) * size * np.stack([np.cos(turns), np.sin(turns)], axis=1)
        walk = np.cumsum(steps, axis=0) + rng.uniform(0, size, 2)
        thickness = int(rng.integers(1, 4))
        points = np.round(walk).astype(np.int32)
        cv2.polylines(canvas, [points], False, _color(rng).tolist(), thickness, cv2.LINE_AA)
    return canvas.astype(np.float32)


def _paint(
    rng: np.random.Generator, image: np.ndarray, instance: Instance, mask: np.ndarray
) -> None:
    """Paint an instance, its texture warped with it, onto a float image in place."""
    rows, columns = np.nonzero(mask)
    window = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    under = image[window]
    alpha = mask[window][..., None]
    background = (under * alpha).sum((0, 1)) / alpha.sum()

    candidates = np.stack([_color(rng) for _ in range(16)])
    contrast = np.linalg.norm(candidates - background, axis=1)
    first = candidates[np.argmax(contrast >= MIN_CONTRAST)]  # the first colour that has enough
    second = _blend(first, _color(rng), rng.uniform(*TEXTURE_DEPTH))

    height, width = under.shape[:2]
    corner = np.array([columns.min(), rows.min()], np.float32)
    points = instance.to_template(_pixel_grid(height, width) + corner).astype(np.float32)
    shading = 1 + points @ rng.uniform(-0.12, 0.12, (2, 1)).astype(np.float32)
    texture = _texture(rng, points * 2)
    image[window] += alpha * (_blend(first, second, texture) * shading - under)


def _texture(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """A random pattern with a period around 1, at (H, W, 2) points: (H, W, 1) in [0, 1]."""
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = rng.uniform(0.8, 2)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]], points.dtype) * points.dtype.type(
        2 * np.pi * frequency
    )
    x, y = np.moveaxis(points @ turn, -1, 0)
    kind = rng.integers(5)
    if kind == 0:  # plain
        value = np.zeros_like(x)
    elif kind == 1:  # stripes
        value = _soft_step(np.sin(x + phase))
    elif kind == 2:  # checks
        value = _soft_step(np.sin(x / 1.5 + phase) * np.sin(y / 1.5) * 2)
    elif kind == 3:  # dots
        value = _soft_step(np.cos(x) + np.cos(y) - 0.9)
    else:  # ripples
        value = 0.5 + 0.5 * np.sin(x + phase + 1.5 * np.sin(y))
    return value[..., None]


def _soft_step(value: np.ndarray) -> np.ndarray:
    return np.clip(value * 3 + 0.5, 0, 1)


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    return first + (second - first) * weight


def _color(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(15, 240, 3).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, channels: int = 1) -> np.ndarray:
    """Random values on a coarse grid, interpolated: (size, size, channels) float32 in [0, 1]."""
    coarse = rng.random((cells, cells, channels), dtype=np.float32)
    fine = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(fine.reshape(size, size, channels), 0, 1)


def _pixel_grid(height: int, width: int) -> np.ndarray:
    """Pixel centres (x, y) in continuous coordinates: (height, width, 2) float32."""
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    x, y = np.meshgrid(columns + 0.5, rows + 0.5)
    return np.stack([x, y], axis=-1)


# Contact sheet


def _draw_annotations(image: np.ndarray, annotations: list[dict], size: int = 300) -> np.ndarray:
    zoom = size / image.shape[0]
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    for annotation in annotations:
        for polygon in annotation["segmentation"]:
            points = np.round(np.reshape(polygon, (-1, 2)) * zoom - 0.5).astype(np.int32)
            cv2.polylines(image, [points], True, (255, 255, 255), 1, cv2.LINE_AA)
        left, top, width, height = np.array(annotation["bbox"]) * zoom - [0.5, 0.5, 0, 0]
        corners = np.round([[left, top], [left + width, top + height]]).astype(int).tolist()
        cv2.rectangle(image, *corners, (60, 230, 60), 2)
    for annotation in annotations:
        x, y = (np.array(annotation["bbox"][:2]) * zoom).astype(int).tolist()
        label = CLASSES[annotation["category_id"] - 1]
        (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        cv2.rectangle(image, (x, y), (x + width + 6, y + height + 8), (60, 230, 60), -1)
        _put_text(image, label, (x + 3, y + height + 3), 0.5, (0, 0, 0))
    return image


def _put_text(
    image: np.ndarray, text: str, at: tuple[int, int], scale: float, color: tuple[int, int, int]
) -> None:
    cv2.putText(image, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, color, 1, cv2.LINE_AA)
