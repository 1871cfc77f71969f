"""The part of a detector that is exported, and images to verify it with.

It is what learns: backbone, neck and heads, up to the heads' raw outputs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mmcv.transforms import Compose
from mmdet.models.detectors import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import get_test_pipeline_cfg, register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from mmdcn.datasets import warped_shapes
from mmdcn.deploy.comparison import LargestError, Tolerance
from mmdcn.deploy.dense_heads import outputs_of
from mmdcn.deploy.detector import EndToEnd, dense_head_of
from mmdcn.deploy.refusals import ExportError
from mmdcn.deploy.roi_heads import replace_extractors
from mmdcn.engine.preflight import ConfigError, check_weights, class_names, trained_classes
from mmdcn.files import images_in

__all__ = ["ExportError", "Exportable", "Network", "build", "find_images", "load_images"]

IMAGES_BY_DEFAULT = 3


# ------------------------------------------------------------------------------------ the network


class Network(nn.Module):
    """The part of a detector that becomes the file.

    Its inputs are `images`, of shape (N, 3, H, W), as the detector's ``data_preprocessor`` gives
    them, and for a two-stage detector `boxes`, of shape (K, 5): the number of the image, then left,
    top, right and bottom in pixels of `images`. Its outputs are those of the dense head at each
    level, and of the RoI head for each box; :attr:`output_names` tells them apart.

    Args:
        detector: of mmdet's one-stage or two-stage detectors.

    Raises:
        ExportError: the detector is of another kind, or has an RoI head that is not mmdet's
            standard one.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.has_boxes = isinstance(detector, TwoStageDetector) and detector.with_roi_head
        self._dense = dense_head_of(detector)
        if self.has_boxes:
            if not isinstance(detector.roi_head, StandardRoIHead):
                is_cascade = isinstance(detector.roi_head, CascadeRoIHead)
                raise ExportError(
                    "model.roi_head: expected mmdet's StandardRoIHead, got "
                    f"{type(detector.roi_head).__name__}"
                    + (", whose stages refine boxes in between: leave out --raw" * is_cascade)
                )
            replace_extractors(detector.roi_head)
        self.output_names: list[str] = []

    metadata: Mapping[str, str] = MappingProxyType({})

    @property
    def input_names(self) -> list[str]:
        return ["images", "boxes"] if self.has_boxes else ["images"]

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """All raw outputs; :attr:`output_names` is then of the same length."""
        features = self.detector.extract_feat(images)
        head = getattr(self.detector, self._dense)
        outputs = outputs_of(head, features)
        # mmdet passes them to the loss in this order, which is how it names them.
        names = inspect.signature(head.loss_by_feat).parameters
        named = dict(_named(self._dense, dict(zip(names, outputs))))
        if self.has_boxes:
            roi_head = self.detector.roi_head
            results = roi_head._bbox_forward(features, boxes)
            if roi_head.with_mask:
                results |= roi_head._mask_forward(features, boxes)
            kept = ("cls_score", "bbox_pred", "mask_preds")
            named |= _named("roi_head", {key: results[key] for key in kept if key in results})
        self.output_names = list(named)
        return tuple(named.values())

    def inputs_of(self, data: dict) -> tuple[Tensor, ...]:
        """Its inputs for what a test pipeline gives, collated.

        Boxes are those that the detector's own first stage proposes.
        """
        data = self.detector.data_preprocessor(data, training=False)
        images = data["inputs"]
        if not self.has_boxes:
            return (images,)
        features = self.detector.extract_feat(images)
        proposed = self.detector.rpn_head.predict(features, data["data_samples"], rescale=False)
        return images, bbox2roi([result.bboxes for result in proposed])

    def twice(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A batch of an image and its mirror image, each with all boxes."""
        images, *boxes = inputs
        return (torch.cat([images, images.flip(3)]), *map(_boxes_of_both, boxes))

    def comparison(self, tolerance: Tolerance) -> LargestError:
        """What compares results in another runtime with this module's."""
        return LargestError(tolerance=tolerance)


def _boxes_of_both(boxes: Tensor) -> Tensor:
    again = boxes.clone()
    again[:, 0] = 1
    return torch.cat([boxes, again])


def _named(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif value is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _named(f"{prefix}.{key}", item)


#: What can be exported: a detector's network, or the whole of it.
Exportable = Network | EndToEnd


def build(
    cfg: Config, checkpoint: str | Path, raw: bool = False, with_preprocessing: bool = False
) -> Exportable:
    """The detector of a config, with the weights of a checkpoint, on the CPU, to be exported.

    Args:
        cfg: the detector's config.
        checkpoint: file or address.
        raw: whether the outputs are the heads' raw ones.
        with_preprocessing: whether images are normalised and padded within; not with `raw`.

    Raises:
        ConfigError: there is no such checkpoint, or it is another model's.
        ExportError: see :class:`Network` and :class:`~mmdcn.deploy.detector.EndToEnd`.
        UnsafeCheckpointError: the checkpoint holds more than plain data.
    """
    if "://" not in str(checkpoint) and not os.path.isfile(checkpoint):
        raise ConfigError(f"no checkpoint {str(checkpoint)!r}")
    check_weights(cfg, str(checkpoint))
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    detector = revert_sync_batchnorm(MODELS.build(cfg.model))
    loaded = load_checkpoint(detector, str(checkpoint), map_location="cpu")
    if raw:
        return Network(detector)
    names = trained_classes(loaded)
    return EndToEnd(detector, with_preprocessing, class_names(cfg) if names is None else names)


# ----------------------------------------------------------------------------------------- images


def find_images(cfg: Config, folder: Path) -> list[Path]:
    """Images to verify with: those of the config's test set, or else generated ones.

    Args:
        cfg: the detector's config.
        folder: where images are generated, where the test set is not there.
    """
    dataset = cfg.get("test_dataloader", {}).get("dataset", {})
    root = Path(dataset.get("data_root") or "", dataset.get("data_prefix", {}).get("img") or "")
    images = list(islice(images_in(root), IMAGES_BY_DEFAULT)) if dataset and root.is_dir() else []
    if images:
        return images
    parameters = warped_shapes.Parameters(
        train_images=1, val_images=IMAGES_BY_DEFAULT, image_size=256, strengths=()
    )
    warped_shapes.generate(folder / "shapes", parameters)
    return sorted((folder / "shapes").rglob("val/*"))


def load_images(
    cfg: Config, network: Exportable, paths: Sequence[Path]
) -> Iterator[tuple[Tensor, ...]]:
    """What the network is given for each image, alone in its batch.

    Raises:
        ConfigError: a file is missing, or is no image.
    """
    pipeline = Compose(
        [step for step in get_test_pipeline_cfg(cfg) if "LoadAnnotations" not in step["type"]]
    )
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"no image {str(path)!r}")
        try:
            data = pseudo_collate([pipeline(dict(img_path=str(path), img_id=0))])
        except (AssertionError, AttributeError, ValueError) as error:
            raise ConfigError(f"cannot read the image {path}: {error}") from error
        with torch.no_grad():
            yield network.inputs_of(data)
