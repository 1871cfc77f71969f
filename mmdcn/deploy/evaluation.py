"""An exported file in the place of a detector, for mmdet's data loaders and evaluators."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor

from mmdcn import machine
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import first_line

from .masks import paste_masks

__all__ = ["ExportedDetector", "File", "check_classes", "open_and_check"]

_INPUTS = ["images", "image_sizes"]


class File:
    """A file of `tools/export_onnx.py` in onnxruntime, or what OpenVINO has made of it.

    Args:
        path: the file, whose name ends in ``.onnx``, or in ``.xml`` for OpenVINO.
        threads: of the CPU; torch's number of them by default.

    Raises:
        ConfigError: it is no such file, or the runtime that it needs is not there.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = str(path)
        open_file = _in_openvino if self.path.endswith(".xml") else _in_onnxruntime
        runtime = open_file(self.path, threads or torch.get_num_threads())
        self._run, self.output_names = runtime.run, runtime.outputs
        if runtime.inputs != _INPUTS or runtime.outputs[:3] != ["boxes", "scores", "labels"]:
            raise ConfigError(
                f"{self.path}: expected a whole detector, with inputs {_INPUTS}, got inputs "
                f"{runtime.inputs} and outputs {runtime.outputs}: export it again without --raw"
            )
        self.metadata: dict[str, Any] = {
            name: json.loads(value) for name, value in runtime.metadata.items()
        }

    def __call__(self, images: np.ndarray, image_sizes: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name, for a batch.

        Raises:
            ValueError: the images are none, or have another number of channels or dtype.
        """
        dtype = np.uint8 if self.metadata.get("with_preprocessing") else np.float32
        if images.ndim != 4 or images.shape[1] != 3 or not len(images) or images.dtype != dtype:
            raise ValueError(
                f"images: expected (N, 3, H, W) in {np.dtype(dtype)}, N at least 1, got "
                f"{images.shape} in {images.dtype}"
            )
        if image_sizes.shape != (len(images), 2):
            raise ValueError(
                f"image_sizes: expected a height and a width for each of {len(images)} images, "
                f"got an array of shape {image_sizes.shape}"
            )
        given = dict(images=images, image_sizes=image_sizes.astype(np.int64))
        return dict(zip(self.output_names, self._run(given)))


@dataclass(frozen=True)
class _Runtime:
    """A file in a runtime: names of inputs and outputs, metadata in JSON, and what computes."""

    inputs: list[str]
    outputs: list[str]
    metadata: dict[str, str]
    run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def _in_onnxruntime(path: str, threads: int) -> _Runtime:
    try:
        session = machine.onnxruntime_session(path, threads)
    except ImportError as error:
        raise ConfigError(
            f"{path} needs onnxruntime to run ({error}): `pip install onnxruntime`"
        ) from error
    except Exception as error:  # onnxruntime's own kinds, which have no common ancestor
        problem = machine.onnxruntime_problem()
        raise ConfigError(
            f"onnxruntime cannot read {path}: {first_line(error)}"
            + (f"; {problem}" if problem else "")
        ) from error
    metadata = session.get_modelmeta().custom_metadata_map
    return _Runtime(
        inputs=[value.name for value in session.get_inputs()],
        outputs=[value.name for value in session.get_outputs()],
        metadata={
            key.removeprefix("mmdcn."): value
            for key, value in metadata.items()
            if key.startswith("mmdcn.")
        },
        run=lambda given: session.run(None, given),
    )


def _in_openvino(path: str, threads: int) -> _Runtime:
    from . import openvino

    model = openvino.read(path)
    compiled = openvino.compile_model(model, INFERENCE_NUM_THREADS=threads)
    return _Runtime(
        inputs=[value.any_name for value in compiled.inputs],
        outputs=[value.any_name for value in compiled.outputs],
        metadata=openvino.metadata(model),
        run=lambda given: [value.copy() for value in compiled(given).values()],
    )


def check_classes(file: File, classes: Sequence[str] | None) -> None:
    """Check that a file detects the classes that it is evaluated on, in their order.

    Raises:
        ConfigError: it was exported with others.
    """
    exported = file.metadata.get("classes")
    if exported is not None and classes is not None and list(classes) != exported:
        raise ConfigError(
            f"{file.path} detects {len(exported)} classes, {', '.join(exported[:4])}, …, and the "
            f"data has {len(classes)}, {', '.join(list(classes)[:4])}, …: expected the same, in "
            "one order"
        )


# Opening a file takes seconds, or minutes: one that was checked is taken over.
_checked: dict[str, File] = {}


def open_and_check(path: str, classes: Sequence[str] | None) -> None:
    """Check a file that the :class:`ExportedDetector` which is built next is to open.

    Raises:
        ConfigError: see :class:`File` and :func:`check_classes`.
    """
    file = File(path)
    check_classes(file, classes)
    _checked[path] = file


@MODELS.register_module()
class ExportedDetector(BaseModel):
    """An exported file, which predicts as the detector that it was written from.

    Args:
        file: its name.
        data_preprocessor: the detector's, of the config that it was exported with.
    """

    def __init__(self, file: str, data_preprocessor: dict) -> None:
        own = _checked.pop(file, None) or File(file)
        if own.metadata.get("with_preprocessing"):
            # Images stay as they are read, in the upper left corners of a batch.
            data_preprocessor = dict(type=data_preprocessor["type"])
        super().__init__(data_preprocessor)
        self.file = own

    def forward(
        self, inputs: Tensor, data_samples: list[DetDataSample], mode: str = "predict"
    ) -> list[DetDataSample]:
        """Predictions in each image, in pixels of the file that it was read from."""
        if mode != "predict":
            raise ValueError(f"mode: expected 'predict', as a file cannot be trained, got {mode!r}")
        images = inputs.cpu().numpy()
        if self.file.metadata.get("with_preprocessing"):
            images = images.astype(np.uint8)
        sizes = np.array([sample.img_shape[:2] for sample in data_samples])
        outputs = self.file(images, sizes)
        for index, sample in enumerate(data_samples):
            own = {name: values[index] for name, values in outputs.items()}
            sample.pred_instances = self._instances(own, sample)
        return data_samples

    def _instances(self, outputs: dict[str, np.ndarray], sample: DetDataSample) -> InstanceData:
        used = outputs["scores"] > 0
        scale = np.tile(np.asarray(sample.scale_factor, dtype=np.float32), 2)
        boxes = outputs["boxes"][used] / scale
        found = InstanceData(
            bboxes=torch.from_numpy(boxes),
            scores=torch.from_numpy(outputs["scores"][used]),
            labels=torch.from_numpy(outputs["labels"][used]),
        )
        if "masks" in outputs:
            height, width = sample.ori_shape[:2]
            threshold = self.file.metadata["mask_thr_binary"]
            masks = paste_masks(outputs["masks"][used], boxes, height, width, threshold)
            found.masks = torch.from_numpy(masks)
        return found
