"""Warped shapes: a detection data set in COCO format, made on the spot from a seed.

Images of textured shapes and glyphs on cluttered backgrounds, every instance bent by a random
affine, projective or elastic warp of a set strength. Colour and texture are drawn without regard to
the class.
The package needs NumPy, OpenCV, shapely and rich, but neither PyTorch nor the detection toolbox.
"""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from rich.progress import track

from . import interruptions
from .painting import draw_background, paint, to_uint8
from .parameters import Parameters, Split
from .shapes import CLASSES, TEMPLATES, Instance, annotate, place, rasterize

__all__ = [
    "CLASSES",
    "CONTACT_SHEET",
    "MANIFEST",
    "TEMPLATES",
    "VERSION",
    "Instance",
    "Parameters",
    "Scene",
    "Split",
    "annotate",
    "contact_sheet",
    "draw_scene",
    "generate",
    "manifest",
    "rasterize",
]

T = TypeVar("T")

# Part of the manifest: raise it with every change of what the generator draws.
VERSION = 1

MANIFEST = "manifest.json"
CONTACT_SHEET = "contact_sheet.png"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Scene:
    """One image with what is in it.

    Args:
        image: (H, W, 3) uint8, BGR as OpenCV has it.
        instances: the shapes in it.
        masks: one (H, W) float32 per instance, the covered fraction of each pixel.

    Example:
        >>> scene = draw_scene(Parameters(), Split("test", 2, num_images=1, strength=1.0), index=0)
        >>> len(scene.masks) == len(scene.instances) > 0
        True
    """

    image: np.ndarray
    instances: list[Instance] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)


def draw_scene(parameters: Parameters, split: Split, index: int) -> Scene:
    """Draw one image of a split.

    Example:
        >>> parameters = Parameters(image_size=96)
        >>> draw_scene(parameters, parameters.splits()[0], index=0).image.shape
        (96, 96, 3)
    """
    size = parameters.image_size
    seed = [parameters.seed, split.stream, index]
    rng = np.random.default_rng(seed)
    image = draw_background(rng, size)
    scene = Scene(image)
    for number in range(rng.integers(parameters.min_instances, parameters.max_instances + 1)):
        # A generator of its own, so that what one instance consumes changes no other.
        instance_rng = np.random.default_rng([*seed, number])
        instance = place(instance_rng, parameters, split.strength, scene.instances)
        if instance is None:
            continue
        mask = rasterize(instance.outline, size)
        paint(instance_rng, image, instance, mask)
        scene.instances.append(instance)
        scene.masks.append(mask)
    image += rng.standard_normal(image.shape, dtype=np.float32) * 4
    return Scene(to_uint8(image), scene.instances, scene.masks)


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

    Example:
        >>> parameters = Parameters(train_images=2, val_images=1, image_size=64, strengths=())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     generate(f"{folder}/shapes", parameters, progress=False)
        ...     generate(f"{folder}/shapes", parameters, progress=False)
        True
        False
    """
    out_dir = Path(out_dir)
    found = _read_manifest(out_dir)
    if found == manifest(parameters):
        return False
    _refuse_to_replace(out_dir, found, manifest(parameters), overwrite)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}.", dir=out_dir.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        (made / "annotations").mkdir()
        for split in parameters.splits():
            _write_split(made, split, parameters, progress)
        (made / CONTACT_SHEET).write_bytes(_encode(".png", contact_sheet(made, parameters)))
        (made / MANIFEST).write_text(json.dumps(manifest(parameters), indent=2) + "\n")
        if out_dir.exists():
            out_dir.rename(Path(scratch) / "old")
        made.rename(out_dir)
    return True


def manifest(parameters: Parameters) -> dict:
    """What a data set's manifest says: the parameters, and the version of this generator.

    Example:
        >>> manifest(Parameters(seed=3))["seed"]
        3
    """
    made_by = {"generator": __name__, "version": VERSION}
    return json.loads(json.dumps(made_by | asdict(parameters)))


def _refuse_to_replace(out_dir: Path, found: dict | None, wanted: dict, overwrite: bool) -> None:
    """Raise FileExistsError for a folder that must stay as it is; `found` is its manifest."""
    if found is not None and not overwrite:
        differing = [k for k in wanted if found.get(k) != wanted[k]]
        raise FileExistsError(
            f"{out_dir} holds warped shapes made with other values of {', '.join(differing)}: "
            "overwrite it (--overwrite), or choose another directory"
        )
    if found is None and out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise FileExistsError(
            f"{out_dir} exists and was not made by this generator, so it is left alone: "
            "choose a directory that is empty or does not exist"
        )


def _read_manifest(data_dir: Path) -> dict | None:
    try:
        found = json.loads((data_dir / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    is_ours = isinstance(found, dict) and found.get("generator") == __name__
    return found if is_ours else None


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
    with contextlib.closing(_in_threads(write_image, split.num_images)) as results:
        drawn = track(
            results,
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
    coco = {
        "info": {"description": f"Warped shapes, {split.name}, strength {split.strength:g}"},
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    (data_dir / "annotations" / f"{split.name}.json").write_text(json.dumps(coco))


def _in_threads(function: Callable[[int], T], count: int) -> Iterator[T]:
    """``function(0)``, ``function(1)``, … in this order, computed in threads."""
    with interruptions.deferred() as run_handlers:
        # The heavy work is inside NumPy and OpenCV, which let go of the interpreter lock.
        pool = ThreadPoolExecutor()
        try:
            for result in pool.map(function, range(count)):
                run_handlers()
                yield result
        finally:
            pool.shutdown(cancel_futures=True)  # because an interruption should not wait


def _encode(extension: str, image: np.ndarray, options: Sequence[int] = ()) -> bytes:
    return cv2.imencode(extension, image, options)[1].tobytes()


def contact_sheet(data_dir: Path, parameters: Parameters, columns: int = 6) -> np.ndarray:
    """The first images of every split with their boxes and labels: one row each, BGR uint8.

    Example:
        >>> parameters = Parameters(train_images=2, val_images=1, image_size=64, strengths=())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = generate(f"{folder}/shapes", parameters, progress=False)
        ...     contact_sheet(Path(folder) / "shapes", parameters).shape
        (700, 1872, 3)
    """
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
