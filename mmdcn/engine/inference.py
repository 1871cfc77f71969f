"""Predictions on image files: mmdet's inferencer batch by batch, and what it writes."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmdet.apis import DetInferencer
from mmengine.config import Config
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmdcn import files
from mmdcn.engine import preflight
from mmdcn.engine.preflight import ConfigError

__all__ = ["Predicted", "build", "predict"]

# The toolbox writes a picture under its image's name, and a .pgm has no colours.
_DRAWABLE = tuple(suffix for suffix in files.IMAGE_SUFFIXES if suffix != ".pgm")


@dataclass
class Predicted:
    """What became of the images.

    Attributes:
        images: those that the detector has seen.
        unreadable: those that are no images, or are damaged.
    """

    images: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)


def build(cfg: Config, checkpoint: str, device: str | None, palette: str = "none") -> DetInferencer:
    """mmdet's inferencer, which reports nothing of its progress.

    Args:
        cfg: the detector's config.
        checkpoint: file or address.
        device: torch's name of it; None for the best that there is.
        palette: colours of the classes; ``none`` for the config's, or else the checkpoint's.

    Raises:
        ConfigError: the config lacks what this needs, or the checkpoint is another model's.
        UnsafeCheckpointError: the checkpoint holds more than plain data.
    """
    absent = [key for key in ("model", "test_dataloader", "visualizer") if cfg.get(key) is None]
    if absent:
        raise ConfigError(f"the config {cfg.filename} has no {', '.join(absent)}")
    preflight.check_weights(cfg, checkpoint)
    # Pictures go where this tool is told, not to the visualizer's backends.
    warnings.filterwarnings("ignore", message="(`Visualizer` backend|Failed to add .*VisBackend)")
    # Boxes end at the image's border, where they are drawn as far as they are seen.
    warnings.filterwarnings("ignore", message="Warning: The (bbox|polygon) is out of bounds")
    inferencer = DetInferencer(cfg, checkpoint, device, palette=palette, show_progress=False)
    _name_classes(inferencer, cfg, checkpoint)
    return inferencer


def _name_classes(inferencer: DetInferencer, cfg: Config, checkpoint: str) -> None:
    """Name the classes as the config does where the checkpoint does not: mmdet takes COCO's."""
    classes = preflight.class_names(cfg)
    if classes is None or preflight.names_classes(checkpoint):
        return
    inferencer.model.dataset_meta["classes"] = tuple(classes)
    inferencer.visualizer.dataset_meta = inferencer.model.dataset_meta


def predict(
    inferencer: DetInferencer,
    images: Sequence[Path],
    out_dir: Path | None,
    batch_size: int = 1,
    **options: object,
) -> Predicted:
    """Detect objects in images, and write pictures to ``vis/`` and predictions to ``preds/``.

    Files appear under their names when they are complete. An image that cannot be read is passed
    over.

    Args:
        inferencer: see :func:`build`.
        images: files, whose names differ.
        out_dir: where to write; None for nowhere.
        batch_size: images at a time.
        options: of the inferencer's call: ``pred_score_thr``, ``no_save_vis`` and so on.
    """
    predicted = Predicted()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("images", total=len(images))
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            readable = [path for path in batch if files.read_image(path) is not None]
            predicted.unreadable += [path for path in batch if path not in readable]
            if readable:
                _predict_batch(inferencer, readable, out_dir, options)
            predicted.images += readable
            progress.advance(task, len(batch))
    return predicted


def _predict_batch(
    inferencer: DetInferencer, batch: list[Path], out_dir: Path | None, options: dict
) -> None:
    options = {"batch_size": len(batch), **options}
    if out_dir is None:
        inferencer([str(path) for path in batch], **options)
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished_", dir=out_dir) as folder:
        results = Path(folder, "results")
        inferencer([_drawable(path, Path(folder)) for path in batch], out_dir=results, **options)
        for written in sorted(path for path in results.rglob("*") if path.is_file()):
            target = out_dir / written.relative_to(results)
            target.parent.mkdir(parents=True, exist_ok=True)
            written.replace(target)


def _drawable(path: Path, folder: Path) -> str:
    """A name of an image by which a picture in colour can be written: where need be, a link's."""
    if path.suffix.lower() in _DRAWABLE:
        return str(path)
    link = folder / f"{path.stem}.png"
    link.symlink_to(path.absolute())
    return str(link)
