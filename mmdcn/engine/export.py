"""A detector's network as an ONNX file of standard operators, compared with PyTorch.

The network is what learns: backbone, neck and heads, up to the heads' raw outputs. What comes
before (resizing, normalisation, padding) and after (decoding of boxes, NMS) is the toolbox's, and
not in the file.
"""

from __future__ import annotations

import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from mmdcn.engine.preflight import ConfigError

__all__ = ["ExportError", "Network", "Verified", "build", "export", "find_images", "load_images"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
IMAGES_BY_DEFAULT = 3
# Distance of onnxruntime's outputs from PyTorch's, relative to the largest element of each output
# (or to 1, where that is smaller), up to which they are the same.
TOLERANCE = 1e-4


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
        detector: one of mmdet's one-stage or two-stage detectors.

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

    Outside an export it behaves like the extractor that it wraps.
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
        ConfigError: there is no such checkpoint.
        ExportError: see :class:`Network`.
        UnsafeCheckpointError: the checkpoint holds more than plain data.
    """
    if "://" not in str(checkpoint) and not os.path.isfile(checkpoint):
        raise ConfigError(f"no checkpoint {str(checkpoint)!r}")
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
    if dataset and root.is_dir():
        found = (p for p in sorted(root.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES)
        if images := list(islice(found, IMAGES_BY_DEFAULT)):
            return images
    parameters = warped_shapes.Parameters(
        train_images=1, val_images=IMAGES_BY_DEFAULT, image_size=256, strengths=()
    )
    warped_shapes.generate(folder / "shapes", parameters)
    return sorted((folder / "shapes").rglob("val/*"))


def load_images(
    cfg: Config, network: Network, paths: Sequence[Path]
) -> Iterator[tuple[Tensor, ...]]:
    """The network's input for each image, alone in its batch.

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


# ----------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Verified:
    """How the file compares with PyTorch.

    Attributes:
        largest_error: over all outputs and images, relative to the largest element of the output
            in PyTorch, or to 1 where that is smaller.
        output: the name of the output that has it.
        milliseconds: median time for one image, by the name of what computed it.
        shape: the shape of that image.
    """

    largest_error: float
    output: str
    milliseconds: dict[str, float]
    shape: tuple[int, ...]


def export(
    network: Network,
    images: Sequence[tuple[Tensor, ...]],
    path: Path,
    seconds: float = 5.0,
    report: Callable[[str], None] = lambda step: None,
) -> Verified:
    """Write the network to an ONNX file, and compare it with PyTorch on images.

    Batch, height, width and the number of boxes stay open. The file appears under its name only
    once it has been verified.

    Args:
        network: what to write.
        images: inputs of the network, for one image each.
        path: the file.
        seconds: how long to measure the speed of each.
        report: is told what begins.

    Raises:
        ExportError: an operation has no counterpart among ONNX's standard operators, or the file
            computes something else than PyTorch.
        ConfigError: a package that the exporter needs is missing, or there can be no such file.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401

        import mmdcn.ops.onnx  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"the export needs onnx, onnxscript and onnxruntime: {error}; "
            "`pip install onnx onnxscript onnxruntime`"
        ) from error
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: expected the name of a file, got a folder")
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    try:
        report("writing the network, which may take minutes")
        _write(network, images[0], temporary)
        _refuse_other_operators(onnx.load(temporary))
        report("comparing onnxruntime with PyTorch")
        verified = _verify(network, images, str(temporary), seconds)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return verified


def _write(network: Network, example: tuple[Tensor, ...], path: Path) -> None:
    # A size of 1 would be taken for one that never changes.
    example = (example[0].repeat(2, 1, 1, 1), *(_boxes_of_both(boxes) for boxes in example[1:]))
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})[: len(example)]
    with torch.no_grad():
        try:
            program = torch.export.export(network, example, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            where = _module_of(error, network)
            raise ExportError(f"{where} cannot be exported: {_reason(error)}") from error
        network(*example)  # This call names the outputs.
        try:
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                input_names=network.input_names,
                output_names=network.output_names,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(
                f"{_node_of(error)} has no counterpart among ONNX's standard operators: "
                f"{_first_line(_innermost(error))}"
            ) from error
    onnx_program.save(path, external_data=False)


def _boxes_of_both(boxes: Tensor) -> Tensor:
    again = boxes.clone()
    again[:, 0] = 1
    return torch.cat([boxes, again])


def _refuse_other_operators(model) -> None:
    """Raise ExportError for a node that is not of ONNX's own domain."""
    for node in [*model.graph.node, *(node for f in model.functions for node in f.node)]:
        if node.domain not in ("", "ai.onnx"):
            raise ExportError(
                f"{node.name} ({node.domain}::{node.op_type}) has no counterpart among ONNX's "
                "standard operators"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _reason(error: BaseException) -> str:
    """The error's first line, or which sizes the network's code turns into constants."""
    fixed = re.findall(r"\['(\w+)'\]\.size\(\)\[(\d)\] as dynamic .* a constant", str(error))
    if not fixed:
        return _first_line(error)
    sizes = " and ".join(f"{name}.shape[{dimension}]" for name, dimension in fixed)
    return f"its code makes a constant of {sizes}, which must stay open"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _values(error: BaseException, name: str) -> Iterator[Any]:
    """The values of a local variable of this name in the calls that the error went through.

    The exporters' messages do not always say where in the network they stopped.
    """
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if name in frame.f_locals:
                yield frame.f_locals[name]
        error = error.__cause__


def _node_of(error: BaseException) -> str:
    """The node that the exporter stopped at, and the module that it stands for."""
    where = "the network"
    for node in _values(error, "node"):
        if isinstance(node, torch.fx.Node):
            modules = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
            where = f"{node.name} ({node.target}, in {modules[-1] if modules else 'the network'})"
    return where


def _module_of(error: BaseException, network: Network) -> str:
    """The innermost module in whose ``forward`` the export stopped."""
    names = {module: name for name, module in network.detector.named_modules()}
    where = "the network"
    for module in _values(error, "self"):
        if isinstance(module, nn.Module) and names.get(module):
            where = f"{names[module]} ({type(module).__name__})"
    return where


# ------------------------------------------------------------------------------------ verification


def _verify(
    network: Network, images: Sequence[tuple[Tensor, ...]], path: str, seconds: float
) -> Verified:
    import onnxruntime

    from mmdcn.benchmark import timing

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # onnxruntime's idle threads would slow PyTorch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def in_pytorch(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return network(*inputs)

    def in_onnxruntime(inputs: Sequence[Tensor]) -> list:
        return session.run(None, dict(zip(network.input_names, (t.numpy() for t in inputs))))

    first, *others = images[0]
    both = (torch.cat([first, first.flip(3)]), *map(_boxes_of_both, others))
    largest = (0.0, network.output_names[0])
    for inputs in (*images, both):
        results = zip(network.output_names, in_pytorch(inputs), in_onnxruntime(inputs))
        for name, expected, actual in results:
            actual = torch.from_numpy(actual)
            if actual.shape != expected.shape:
                raise ExportError(
                    f"{name}: expected shape {tuple(expected.shape)} as in PyTorch, got "
                    f"{tuple(actual.shape)} in onnxruntime, for images of {tuple(inputs[0].shape)}"
                )
            error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1.0))
            # `>` would not do, as the error may be NaN.
            if not error <= TOLERANCE:
                raise ExportError(
                    f"{name}: expected onnxruntime's result within {TOLERANCE} of PyTorch's, got "
                    f"an error of {error:.2g} for images of {tuple(inputs[0].shape)}"
                )
            largest = max(largest, (error, name))
    calls = {
        "PyTorch": timing.Call(lambda: in_pytorch(images[0])),
        "onnxruntime": timing.Call(lambda: in_onnxruntime(images[0])),
    }
    samples = timing.interleave(calls, torch.device("cpu"), timing.Budget(seconds, fewest=3))
    medians = {name: timing.median(taken) for name, taken in samples.items()}
    return Verified(*largest, medians, tuple(first.shape))
