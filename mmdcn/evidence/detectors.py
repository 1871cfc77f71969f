"""One run: a Faster R-CNN of an arm trained on warped shapes, and tested on ever more warped ones.

The images, their order and what arms have in common of the first weights are the same for all arms
of a seed, so differences are taken seed by seed.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, set_random_seed
from torch import nn

from mmdcn.datasets import warped_shapes
from mmdcn.engine.offset_hook import add_offset_sums, offset_statistics, offset_sums
from mmdcn.engine.sampled_calls import named_calls
from mmdcn.ops._observers import SampledCall

from .detector_grid import (
    ARMS,
    CONFIG,
    DETECTOR,
    IMAGE_SIZE,
    STRENGTHS,
    TRAIN_IMAGES,
    TRAINED_STRENGTH,
    VAL_IMAGES,
    DetectorRun,
)
from .training import CURVE, Tell, read_weights, save_weights, weights_file


def make_data(folder: Path, seeds: int, progress: bool = False) -> None:
    """The images of the runs of so many seeds.

    They are in ``shapes``, and in ``shapes-upright`` to train on without warps.
    """
    counts = dict(train_images=seeds * TRAIN_IMAGES, val_images=VAL_IMAGES, image_size=IMAGE_SIZE)
    both = {"shapes": (TRAINED_STRENGTH, STRENGTHS), "shapes-upright": (0.0, ())}
    for name, (strength, strengths) in both.items():
        parameters = warped_shapes.Parameters(**counts, strength=strength, strengths=strengths)
        warped_shapes.generate(folder / name, parameters, overwrite=True, progress=progress)


def config(run: DetectorRun, folder: Path) -> Config:
    """The run's config: the demo's, with an arm's layers, and silent."""
    cfg = Config.fromfile(CONFIG)
    arm = ARMS[run.arm]
    for model in (DETECTOR, {"backbone": dict(arm.backbone or {}), "neck": dict(arm.neck or {})}):
        cfg.merge_from_dict({"model": model})
    images = cfg.train_dataloader.dataset
    upright = run.training == "detectors-upright"
    images.data_root = str(folder / ("shapes-upright" if upright else "shapes"))
    images.indices = list(range(run.seed * TRAIN_IMAGES, (run.seed + 1) * TRAIN_IMAGES))
    _resize(images)
    cfg.randomness = dict(seed=run.seed)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=run.iterations)
    warm_up, decay = cfg.param_scheduler
    warm_up.end = decay.begin = max(1, run.iterations // 8)
    decay.end = run.iterations
    cfg.optim_wrapper.paramwise_cfg = dict(
        dcn_offset_lr_mult=run.settings()["offset_learning_rate"]
    )
    if run.arm == "norm":  # the statistics follow the images, and nothing is learned
        cfg.optim_wrapper.optimizer.update(lr=0.0, weight_decay=0.0)
    for name in ("val", "test"):
        for part in ("dataloader", "cfg", "evaluator"):
            cfg[f"{name}_{part}"] = None
    cfg.work_dir = str(folder / "logs" / run.name)
    cfg.experiment_name = f"{run.name}_{time.time_ns()}"
    cfg.visualizer = dict(type="Visualizer", name=cfg.experiment_name)
    cfg.log_level = "ERROR"
    cfg.default_hooks = dict(
        checkpoint=None, logger=dict(type="LoggerHook", interval=run.iterations)
    )
    return cfg


def _resize(images: dict) -> None:
    """Have the images loaded in the size that they have."""
    for step in images["pipeline"]:
        if step["type"] == "Resize":
            step["scale"] = (IMAGE_SIZE, IMAGE_SIZE)


def train(run: DetectorRun, folder: Path, tell: Tell = lambda part: None) -> dict:
    """Train and test; the weights are kept in the folder, as ``NAME.pt``.

    Args:
        run: what to train.
        folder: where the images are, and the weights of the run that this one starts from.
        tell: is told now and then which part of the run is done, from 0 to 1.

    Returns:
        The result, as JSON has it: ``ap`` is COCO's, in percent, by the strength of the warps;
        ``offsets`` has for each layer the mean offset in pixels, the largest one, and the share of
        samples outside, over the images of ``val``.

    Raises:
        InputError: the run that this one starts from has left no weights.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        return _train(run, folder, tell)


def _train(run: DetectorRun, folder: Path, tell: Tell) -> dict:
    register_all_modules()
    start = time.perf_counter()
    runner = Runner.from_cfg(config(run, folder))
    runner.model.init_weights()
    runner.model.load_state_dict(_common_weights(run, folder), strict=False)
    # The trainer would draw them anew.
    runner.model.init_weights = lambda: None
    if run.is_frozen and run.arm != "norm":
        for name, parameter in runner.model.named_parameters():
            parameter.requires_grad_(ARMS[run.arm].added in name)
    curve = _Curve(run.iterations, tell)
    runner.register_hook(curve, priority="LOW")
    runner.train()
    seconds = time.perf_counter() - start
    result = {
        "run": run.settings(),
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        "ap": {str(s): test(runner, run, folder, f"val_s{s}") for s in STRENGTHS},
        "offsets": offsets(runner, run, folder),
        "curve": curve.points,
        "training_seconds": round(seconds, 1),
    }
    save_weights(runner.model, weights_file(run, folder))
    tell(1.0)
    return result


def _common_weights(run: DetectorRun, folder: Path) -> dict[str, torch.Tensor]:
    """What an arm's first weights have in common with the plain detector's of the same seed."""
    if run.base is not None:
        return read_weights(weights_file(run.base, folder))
    if ARMS[run.arm].neck is not None:  # other widths
        return {}
    plain = replace(run, arm="plain")
    set_random_seed(run.seed)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config(plain, folder).model)
    model.init_weights()
    return model.state_dict()


class _Curve(Hook):
    """Keeps the loss at ten points, and tells how far the training is."""

    def __init__(self, iterations: int, tell: Tell) -> None:
        self.points: list[dict] = []
        self._losses: list[float] = []
        self._iterations, self._tell = iterations, tell

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._losses.append(outputs["loss"].item())
        done = runner.iter + 1
        if done * CURVE % self._iterations < CURVE:
            loss = sum(self._losses) / len(self._losses)
            self.points.append({"iteration": done, "loss": round(loss, 4)})
            self._losses.clear()
        self._tell(0.9 * done / self._iterations)


def _dataloader(run: DetectorRun, folder: Path, name: str) -> dict:
    """The demo's val data, of another set."""
    cfg = Config.fromfile(CONFIG)
    loader = cfg.val_dataloader
    loader.dataset.update(
        data_root=str(folder / "shapes"),
        ann_file=f"annotations/{name}.json",
        data_prefix=dict(img=f"{name}/"),
        indices=run.test_images,
    )
    _resize(loader.dataset)
    return loader


@torch.no_grad()
def test(runner: Runner, run: DetectorRun, folder: Path, name: str) -> float:
    """AP in percent on a set of the images."""
    annotations = str(folder / "shapes" / "annotations" / f"{name}.json")
    loader = runner.build_dataloader(_dataloader(run, folder, name), seed=0)
    evaluator = runner.build_evaluator(dict(type="CocoMetric", ann_file=annotations, metric="bbox"))
    evaluator.dataset_meta = loader.dataset.metainfo
    runner.model.eval()
    for batch in loader:
        evaluator.process(data_samples=runner.model.test_step(batch), data_batch=batch)
    metrics = evaluator.evaluate(len(loader.dataset))
    return round(100 * metrics["coco/bbox_mAP"], 2)


@torch.no_grad()
def offsets(runner: Runner, run: DetectorRun, folder: Path) -> dict[str, list[float]]:
    """For each layer the mean and the largest offset and the share outside, over ``val``."""
    sums: dict[str, torch.Tensor] = {}

    def look(name: str, module: nn.Module, describe: Callable[[], SampledCall]) -> None:
        sums[name] = add_offset_sums(sums.get(name), offset_sums(describe()))

    runner.model.eval()
    loader = runner.build_dataloader(_dataloader(run, folder, "val"), seed=0)
    with named_calls(runner.model, look):
        for batch in loader:
            runner.model.test_step(batch)
    return {
        name: [round(value, 4) for value in offset_statistics(*values.tolist())]
        for name, values in sums.items()
    }
