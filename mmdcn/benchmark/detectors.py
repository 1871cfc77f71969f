"""Whole detectors: training iterations and inference, deformable against plain.

Detectors are built from their configs with random weights, and get random images and boxes. What is
timed is the model: forward pass, losses, backward pass and optimizer step in training, and the
forward pass with its post-processing at inference; images are preprocessed beforehand.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmdcn import plugin, timing
from mmdcn.engine.amp import CPUAmpOptimWrapper
from mmdcn.machine import machine, versions

from . import BenchmarkError, memory
from .progress import track
from .random_weights import spread_offsets

KERNELS = ("mmdcn", "mmcv")
PHASES = ("training", "inference")

BOXES_PER_IMAGE = 8
# Distance of what a layer gives by ours and by mmcv's kernels, relative to its norm, beyond which
# one is wrong. In mixed precision mmcv's compute in float32, and differences add up over layers.
TOLERANCE = 1e-3
TOLERANCE_AMP = 1e-1


@dataclass
class Settings:
    """The settings of :func:`run`: what it measures, how long.

    `size` is width and height; `batch` is that of one detector, and `batches` all that are run.
    """

    configs: list[Path]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernels: list[str] = field(default_factory=lambda: list(KERNELS))
    size: tuple[int, int] = (320, 240)
    batch: int = 2
    batches: list[int] = field(default_factory=lambda: [2])
    amp: bool = False
    offset_std: float = 2.0
    threads: int | None = None
    measure_memory: bool = True
    budget: timing.Budget = field(default_factory=timing.Budget)


class Detector:
    """A detector that is ready to train and to predict, on one set of kernels.

    Args:
        path: its config.
        kernels: ``'mmdcn'`` or ``'mmcv'``: what deformable layers run on.
        settings: sizes, device and precision.
    """

    def __init__(self, path: Path, kernels: str, settings: Settings) -> None:
        self.name = path.stem
        self.kernels = kernels
        self.settings = settings
        config = _load(path)
        self.switch()
        torch.manual_seed(0)
        self.model = _build(config, settings)
        self.data = self.model.data_preprocessor(_inputs(config, settings), training=True)
        # A step that changes nothing, so that every iteration is the same.
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4
        )
        if settings.amp and settings.device.type == "cpu":
            # It also gives bfloat16 to those functions of mmcv's that have none.
            CPUAmpOptimWrapper(optimizer=self.optimizer)

    def switch(self) -> None:
        """Let the toolbox run on this detector's kernels."""
        plugin.install() if self.kernels == "mmdcn" else plugin.uninstall()

    def prepare(self, phase: str) -> None:
        self.switch()
        self.model.train(phase == "training")

    def train(self) -> torch.Tensor:
        """One iteration; returns the loss."""
        torch.manual_seed(0)  # so that the same boxes are sampled
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            losses = self.model(**self.data, mode="loss")
        loss, _ = self.model.parse_losses(losses)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def infer(self) -> list:
        with torch.no_grad(), self._autocast():
            return self.model(**self.data, mode="predict")

    def _autocast(self) -> contextlib.AbstractContextManager:
        device_type = self.settings.device.type
        dtype = torch.bfloat16 if device_type == "cpu" else torch.float16
        return torch.autocast(device_type, dtype, enabled=self.settings.amp)

    def call(self, phase: str) -> timing.Call:
        function = self.train if phase == "training" else self.infer
        return timing.Call(function, prepare=lambda: self.prepare(phase))

    def count_flops(self) -> tuple[int, bool]:
        """FLOPs of the prediction for one image, and whether any of them are ours."""
        ours = torch.ops.mmdcn.deform_conv2d
        counter = FlopCounterMode(display=False)
        self.prepare("inference")
        with counter:
            self.infer()
        counts = counter.get_flop_counts()["Global"]
        return sum(counts.values()) // self.settings.batch, ours in counts

    def deformable_outputs(self) -> dict[str, torch.Tensor]:
        """The output of each deformable layer in one prediction, by name."""
        outputs, hooks = {}, []
        for name, module in self.model.named_modules():
            if isinstance(module, (DeformConv2d, ModulatedDeformConv2d)):
                # Layers that several levels share keep their last output.
                keep = functools.partial(self._keep, outputs, name)
                hooks.append(module.register_forward_hook(keep))
        try:
            self.prepare("inference")
            self.infer()
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @staticmethod
    def _keep(outputs: dict, name: str, module: nn.Module, inputs: tuple, output: torch.Tensor):
        outputs[name] = output.detach().float()

    def extra_bytes(self, phase: str) -> int:
        """Bytes that an iteration takes at its peak beside weights, buffers and optimizer state."""
        self.prepare(phase)
        step = self.call(phase).function
        step()
        self.optimizer.zero_grad(set_to_none=True)
        on_cuda = self.settings.device.type == "cuda"
        return memory.cuda_peak(step) if on_cuda else memory.resident_peak(step)


def _load(path: Path) -> Config:
    try:
        config = Config.fromfile(path)
    # Reading a file of Python may raise anything.
    except Exception as error:
        raise BenchmarkError(f"--configs: cannot read {path}: {error}") from error
    if "model" not in config:
        raise BenchmarkError(f"--configs: expected configs of detectors, {path} has no `model`")
    return config


def _build(config: Config, settings: Settings) -> nn.Module:
    register_all_modules(init_default_scope=False)
    init_default_scope(config.get("default_scope", "mmdet"))
    options = copy.deepcopy(config.model)
    _forget_pretrained(options)
    model = revert_sync_batchnorm(MODELS.build(options))
    model.init_weights()
    spread_offsets(model, settings.offset_std)
    return model.to(settings.device)


def _forget_pretrained(options: Config) -> None:
    """Remove what would download weights."""
    if options.get("pretrained") is not None:
        options.pretrained = None
    for key, value in options.items():
        if key == "init_cfg" and isinstance(value, dict) and value.get("type") == "Pretrained":
            options[key] = None
        elif isinstance(value, dict):
            _forget_pretrained(value)
        elif isinstance(value, (list, tuple)):
            for each in value:
                if isinstance(each, dict):
                    _forget_pretrained(each)


def _numbers_of_classes(options: object) -> Iterator[int]:
    if isinstance(options, dict):
        if isinstance(options.get("num_classes"), int):
            yield options["num_classes"]
        for value in options.values():
            yield from _numbers_of_classes(value)
    elif isinstance(options, (list, tuple)):
        for value in options:
            yield from _numbers_of_classes(value)


def _inputs(config: Config, settings: Settings) -> dict:
    width, height = settings.size
    return demo_mm_inputs(
        settings.batch,
        [(3, height, width)] * settings.batch,
        num_items=[BOXES_PER_IMAGE] * settings.batch,
        num_classes=min(_numbers_of_classes(config.model), default=1),
        with_mask="mask_head" in config.model.get("roi_head", {}) or "mask_head" in config.model,
        device=settings.device,
    )


# --------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def toolbox_quiet() -> Iterator[None]:
    """Keep the toolbox from logging every weight and every change of kernels."""
    installed = plugin.report().installed
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        plugin.install() if installed else plugin.uninstall()
        logger.setLevel(level)


def run(settings: Settings, result: dict) -> None:
    """Measure everything, and fill `result` with it, as it will be in JSON.

    Raises:
        BenchmarkError: a config cannot be used, or ours and mmcv's kernels disagree.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    result |= {
        "benchmark": "detectors",
        "machine": machine(settings.device),
        "versions": versions(),
        "settings": {
            "device": settings.device.type,
            "threads": torch.get_num_threads(),
            "size": list(settings.size),
            "batches": settings.batches,
            "amp": settings.amp,
            "offset_std": settings.offset_std,
            "boxes_per_image": BOXES_PER_IMAGE,
            "seconds_per_call": settings.budget.seconds,
        },
        "cases": [],
        "complete": False,
    }
    with toolbox_quiet():
        for batch in settings.batches:
            _run_batch(dataclasses.replace(settings, batch=batch), result)
    result["complete"] = True


def _run_batch(settings: Settings, result: dict) -> None:
    detectors, entries = [], []
    of_batch = f", batch {settings.batch}"
    for path in track((f"building {path.stem}{of_batch}", path) for path in settings.configs):
        for detector, entry in _detectors_of(path, settings):
            detectors.append(detector)
            entries.append({"batch": settings.batch, **entry})
    result["cases"] += entries
    for phase in track((f"{phase}{of_batch}, all in turns", phase) for phase in PHASES):
        calls = {str(i): detector.call(phase) for i, detector in enumerate(detectors)}
        samples = timing.interleave(calls, settings.device, settings.budget)
        for entry, taken in zip(entries, samples.values()):
            entry["times"][phase] = taken
    if settings.measure_memory and memory.can_measure(settings.device):
        paths = {path.stem: path for path in settings.configs}
        steps = [(f"memory of {d.name}{of_batch}", (d, e)) for d, e in zip(detectors, entries)]
        for detector, entry in track(steps):
            entry["extra_bytes"] = _extra_bytes(detector, paths[detector.name])


def _detectors_of(path: Path, settings: Settings) -> Iterator[tuple[Detector, dict]]:
    """A config on each set of kernels, with what is known before anything is timed."""
    ours = Detector(path, "mmdcn", settings)
    flops, deformable = ours.count_flops()
    entry = {
        "config": path.stem,
        "deformable": deformable,
        "parameters": sum(p.numel() for p in ours.model.parameters()),
        "flops": flops,
    }
    if not deformable:
        yield ours, {**entry, "kernels": None, "times": {}}
        return
    if "mmdcn" in settings.kernels:
        yield ours, {**entry, "kernels": "mmdcn", "times": {}}
    if "mmcv" in settings.kernels:
        theirs = Detector(path, "mmcv", settings)
        # Of mmcv's layers, what initialises plain convolutions draws the offset branches' too.
        theirs.model.load_state_dict(ours.model.state_dict())
        _check_layers(ours, theirs)
        yield theirs, {**entry, "kernels": "mmcv", "times": {}}


def _check_layers(ours: Detector, theirs: Detector) -> None:
    """Refuse to time kernels that disagree."""
    outputs, expected = ours.deformable_outputs(), theirs.deformable_outputs()
    bound = TOLERANCE_AMP if ours.settings.amp else TOLERANCE
    for name, output in outputs.items():
        distance = float((output - expected[name]).norm() / expected[name].norm())
        # `>` would not do, as the distance may be NaN.
        if not distance <= bound:
            raise BenchmarkError(
                f"{ours.name}: expected the same output of {name} by mmdcn's and mmcv's kernels, "
                f"within {bound} of its norm, got a distance of {distance:.2g}. Wrong results are "
                "not timed."
            )


def _extra_bytes(detector: Detector, path: Path) -> dict[str, int]:
    settings = detector.settings
    if settings.device.type == "cuda":
        return {phase: detector.extra_bytes(phase) for phase in PHASES}
    order = {
        "path": str(path),
        "kernels": detector.kernels,
        "size": settings.size,
        "batch": settings.batch,
        "amp": settings.amp,
        "offset_std": settings.offset_std,
        "threads": torch.get_num_threads(),
    }
    return memory.measure_apart(__name__, order)[-1]


def measure(order: dict) -> Iterator[dict[str, int]]:
    """The answer to an order of :func:`memory.measure_apart`."""
    path = Path(order["path"])
    settings = Settings(
        [path],
        size=tuple(order["size"]),
        batch=order["batch"],
        amp=order["amp"],
        offset_std=order["offset_std"],
    )
    detector = Detector(path, order["kernels"], settings)
    yield {phase: detector.extra_bytes(phase) for phase in PHASES}
