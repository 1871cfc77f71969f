"""Pictures of what deformable layers sample, drawn while a detector trains."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdcn.layers._checks import NamedArguments

__all__ = ["SamplingVisualizationHook"]


class SamplingVisualizationHook(NamedArguments, Hook):
    """A hook that at intervals draws where deformable layers sampled the batch's first image.

    The picture goes to the runner's visualizer under the name ``sampling_points``, hence to all of
    its backends: files, TensorBoard and so on. It shows the very image that the network was given,
    after augmentation, and costs no forward pass of its own: what the layers sample is recorded in
    the training iteration.

    Args:
        interval: training iterations between pictures; the first one is drawn after the first
            iteration.
        layers: names of one to three deformable layers, each the input of the next, or of modules
            that compute their own offsets; None for the last `num_layers` of the backbone, or for
            one of the neck or head where the backbone has none.
        num_layers: how many layers to follow the points through, 1 to 3.
        max_points: how many positions are shown: the centres of the largest objects, or the
            image's centre where it has none.

    Raises:
        TypeError: there is no such argument.
        ValueError: an argument is out of range.
        ConfigError: when training begins, where the model has no module of a name in `layers`; at
            the first picture, where it calls no deformable operator of which anything can be drawn,
            or none of a name in `layers`. A tool ends in the sentence; it is a ValueError too.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        interval: int = 500,
        layers: Sequence[str] | None = None,
        num_layers: int = 1,
        max_points: int = 4,
    ) -> None:
        if layers is not None and (
            isinstance(layers, str) or not all(isinstance(name, str) for name in layers)
        ):
            raise ValueError(f"layers: expected a list of one to three names, got {layers!r}")
        given = {"interval": interval, "max_points": max_points}
        given["num_layers"] = num_layers if layers is None else len(layers)
        for name, value in given.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if given["num_layers"] > 3:
            raise ValueError(f"layers: expected one to three, got {given['num_layers']}")
        self.interval = interval
        self.layers = layers
        self.num_layers = num_layers
        self.max_points = max_points
        self._recording: ExitStack | None = None

    def before_train(self, runner: Runner) -> None:
        """Check that the model has the layers, before an iteration is spent."""
        from mmdcn.engine.preflight import ConfigError

        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        names = [name for name, _ in model.named_modules()]
        for layer in self.layers or ():
            if layer.partition("#")[0] not in names:
                close = difflib.get_close_matches(layer, names, n=3)
                hint = f", such as {', '.join(map(repr, close))}" if close else ""
                raise ConfigError(
                    f"SamplingVisualizationHook: layers: expected names of the model's modules"
                    f"{hint}, got {layer!r}"
                )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to record, if a picture is due after this iteration."""
        # Drawing needs matplotlib and mmdet, which not every program that imports mmdcn does.
        from mmdcn.visualization import record_sampling

        if runner.iter % self.interval or not is_main_process():
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._recording = ExitStack()
        self._sampled = self._recording.enter_context(record_sampling(model))
        handle = model.data_preprocessor.register_forward_hook(self._keep_batch)
        self._recording.callback(handle.remove)

    def _keep_batch(self, preprocessor: nn.Module, inputs: tuple, batch: dict) -> None:
        self._batch = batch

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw what was recorded."""
        from mmdcn.engine.preflight import ConfigError
        from mmdcn.visualization import (
            SampledImage,
            choose_layers,
            figure_image,
            of_images,
            sampling_figure,
        )

        if self._recording is None:
            return
        self._recording.close()
        self._recording = None
        batch, layers = self._batch, self._sampled
        del self._batch, self._sampled
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        image, sample = batch["inputs"][0], batch["data_samples"][0]
        height, width = sample.img_shape[:2]
        try:
            sampled = SampledImage(
                image=_denormalize(image, model.data_preprocessor)[:height, :width],
                layers=of_images(layers, len(batch["inputs"])),
                input_size=tuple(image.shape[-2:]),
            )
            names = choose_layers(sampled, self.layers, self.num_layers)
        except ValueError as error:
            raise ConfigError(f"SamplingVisualizationHook: {error}") from error
        points = _largest_objects(sample, self.max_points) or [(width / 2, height / 2)]
        runner.visualizer.add_image(
            "sampling_points",
            figure_image(sampling_figure(sampled, names, points)),
            step=runner.iter + 1,
        )

    def after_train(self, runner: Runner) -> None:
        """Stop recording where an iteration was given up."""
        if self._recording is not None:
            self._recording.close()
            self._recording = None


def _denormalize(image: Tensor, preprocessor: nn.Module) -> np.ndarray:
    """The network's input (3, H, W) as an image, (H, W, 3) uint8, RGB."""
    image = image.detach().float()
    if getattr(preprocessor, "_enable_normalize", False):
        image = image * preprocessor.std + preprocessor.mean
    pixels = image.clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    # Images are loaded as BGR; most detectors convert them.
    converted = getattr(preprocessor, "_channel_conversion", False)
    return np.ascontiguousarray(pixels if converted else pixels[..., ::-1])


def _largest_objects(sample: Any, count: int) -> list[tuple[float, float]]:
    boxes = sample.gt_instances.bboxes
    boxes = getattr(boxes, "tensor", boxes)
    areas = (boxes[:, 2:4] - boxes[:, :2]).prod(dim=1)
    largest = boxes[areas.argsort(descending=True)[:count]]
    return [tuple(xy) for xy in ((largest[:, :2] + largest[:, 2:4]) / 2).tolist()]
