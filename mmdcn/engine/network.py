"""The part of a detector that is exported, and images to verify it with.

It is what learns: backbone, neck and heads, up to the heads' raw outputs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmcv.transforms import Compose
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
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
from mmdcn.engine.preflight import ConfigError, check_weights
from mmdcn.files import images_in

__all__ = ["ExportError", "Network", "build", "find_images", "load_images"]

IMAGES_BY_DEFAULT = 3


class ExportError(ConfigError):
    """The network cannot be written in standard operators, or what was written is wrong."""


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
        if isinstance(detector, TwoStageDetector) and detector.with_rpn:
            self._dense = "rpn_head"
        elif isinstance(detector, SingleStageDetector):
            self._dense = "bbox_head"
        else:
            raise ExportError(
                "model: expected a one-stage detector, or a two-stage one with an rpn_head, got "
                f"{type(detector).__name__}"
            )
        if self.has_boxes:
            _check_roi_head(detector.roi_head)
            for name, extractor in list(detector.roi_head.named_children()):
                if isinstance(extractor, SingleRoIExtractor):
                    setattr(detector.roi_head, name, _Extractor(extractor))
        self.output_names: list[str] = []

    @property
    def input_names(self) -> list[str]:
        return ["images", "boxes"] if self.has_boxes else ["images"]

    def forward(self, images: Tensor, boxes: Tensor | None = None) -> tuple[Tensor, ...]:
        """All raw outputs; :attr:`output_names` is then of the same length."""
        features = self.detector.extract_feat(images)
        head = getattr(self.detector, self._dense)
        outputs = head(features)
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

    def proposals(self, images: Tensor, samples: list) -> Tensor:
        """The boxes that the detector's own first stage proposes, as the network wants them."""
        features = self.detector.extract_feat(images)
        proposed = self.detector.rpn_head.predict(features, samples, rescale=False)
        return bbox2roi([result.bboxes for result in proposed])


def _named(prefix: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif value is not None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _named(f"{prefix}.{key}", item)


def _check_roi_head(roi_head: nn.Module) -> None:
    if not isinstance(roi_head, StandardRoIHead):
        raise ExportError(
            f"model.roi_head: expected mmdet's StandardRoIHead, got {type(roi_head).__name__}"
        )
    for name, module in roi_head.named_modules():
        if isinstance(module, SingleRoIExtractor):
            for layer in module.roi_layers:
                if not isinstance(layer, RoIAlign) or layer.pool_mode != "avg":
                    what = type(layer).__name__ if list(layer.children()) else layer
                    raise ExportError(
                        f"model.roi_head.{name}: {what} has no counterpart among ONNX's standard "
                        "operators; RoIAlign with pool_mode='avg' has"
                    )


class _Extractor(nn.Module):
    """A RoI extractor without control flow: each level pools every box, and one is chosen.

    Outside an export it is what it wraps.
    """

    def __init__(self, extractor: SingleRoIExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_inputs = extractor.num_inputs

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        if not torch.compiler.is_exporting():
            return self.extractor(features, boxes)
        levels = self.extractor.map_roi_levels(boxes, len(features)).view(-1, 1, 1, 1)
        pooled = features[0].new_zeros(())
        for level, (layer, x) in enumerate(zip(self.extractor.roi_layers, features)):
            pooled = torch.where(levels == level, _roi_align(layer, x, boxes), pooled)
        return pooled


def _roi_align(layer: RoIAlign, x: Tensor, boxes: Tensor) -> Tensor:
    """ONNX's operator of this name, which computes what mmcv's does."""
    height, width = layer.output_size
    return torch.onnx.ops.symbolic(
        "RoiAlign",
        (x, boxes[:, 1:], boxes[:, 0].long()),
        dict(
            mode="avg",
            output_height=height,
            output_width=width,
            sampling_ratio=layer.sampling_ratio,
            spatial_scale=float(layer.spatial_scale),
            coordinate_transformation_mode="half_pixel" if layer.aligned else "output_half_pixel",
        ),
        dtype=x.dtype,
        shape=(boxes.shape[0], x.shape[1], height, width),
    )


def build(cfg: Config, checkpoint: str | Path) -> Network:
    """The network of a config, with the weights of a checkpoint, on the CPU.

    Raises:
        ConfigError: there is no such checkpoint, or it is another model's.
        ExportError: see :class:`Network`.
        UnsafeCheckpointError: the checkpoint holds more than plain data.
    """
    if "://" not in str(checkpoint) and not os.path.isfile(checkpoint):
        raise ConfigError(f"no checkpoint {str(checkpoint)!r}")
    check_weights(cfg, str(checkpoint))
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    detector = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_checkpoint(detector, str(checkpoint), map_location="cpu")
    return Network(detector)


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
    cfg: Config, network: Network, paths: Sequence[Path]
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
        data = network.detector.data_preprocessor(data, training=False)
        images = data["inputs"]
        with torch.no_grad():
            if not network.has_boxes:
                yield (images,)
            else:
                yield images, network.proposals(images, data["data_samples"])
