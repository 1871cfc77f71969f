"""Whole detectors as exported files, in other runtimes, against PyTorch on our kernels.

Each detector is built from its config with random weights, and written as `tools/export_onnx.py`
does. What is timed is everything behind the preprocessing: the network and its post-processing. In
PyTorch that is mmdet's own `predict`, of the detector as it is and tuned: with norms folded into
convolutions, channels-last, and RoIs pooled by our operator.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from mmdcn import timing
from mmdcn.deploy.comparison import HALF, SINGLE, Matches
from mmdcn.deploy.detector import EndToEnd
from mmdcn.deploy.evaluation import File
from mmdcn.engine import export
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import named_first_line
from mmdcn.layers import DeformRoIPool
from mmdcn.machine import machine, versions
from mmdcn.models import fuse_conv_bn

from . import BenchmarkError, detectors
from .cases import IN_PYTORCH, RUNTIMES
from .progress import track

EAGER = "PyTorch"
# Channels of a pyramid's inputs, by the depth of the ResNet below it.
_PYRAMIDS = {18: [64, 128, 256, 512], 34: [64, 128, 256, 512], 50: [256, 512, 1024, 2048]}


@dataclass
class Settings:
    """The settings of :func:`run`.

    `size` is width and height. Where `depths` are given, each config is measured with a ResNet of
    each of them, in the place of its own of depth 50. `half` says whether files are in float16.
    """

    configs: list[Path]
    depths: tuple[int, ...] = ()
    runtimes: list[str] = field(default_factory=lambda: list(RUNTIMES))
    size: tuple[int, int] = (640, 480)
    batches: list[int] = field(default_factory=lambda: [1, 8])
    half: bool = False
    offset_std: float = 2.0
    threads: int | None = None
    budget: timing.Budget = field(default_factory=timing.Budget)


# What one implementation computes of a batch.
Run = Callable[[], list[Tensor]]


def run(settings: Settings, result: dict) -> None:
    """Measure everything, and fill `result` with it, as it will be in JSON.

    Raises:
        BenchmarkError: a config cannot be used, or a file finds something else than PyTorch.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    result |= {
        "benchmark": "deployment",
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "settings": {
            "threads": torch.get_num_threads(),
            "size": list(settings.size),
            "batches": settings.batches,
            "precision": "float16" if settings.half else "float32",
            "offset_std": settings.offset_std,
            "seconds_per_call": settings.budget.seconds,
        },
        "left_out": {},
        "cases": [],
        "complete": False,
    }
    runtimes = [name for name in settings.runtimes if _is_there(name, result["left_out"])]
    settings = dataclasses.replace(settings, runtimes=runtimes)
    with tempfile.TemporaryDirectory() as folder, detectors.toolbox_quiet():
        paths = list(_with_depths(settings, Path(folder)))
        for path in track((f"{path.stem}, written and timed", path) for path in paths):
            result["cases"] += _measured(path, settings, Path(folder), result["left_out"])
    result["complete"] = True


def _is_there(name: str, left_out: dict[str, str]) -> bool:
    """Whether a runtime is installed; if not, the reason is noted."""
    try:
        if name == "onnxruntime":
            from mmdcn.machine import onnxruntime_problem

            problem = onnxruntime_problem()
            if problem is not None:
                left_out[name] = problem
        elif name == "openvino":
            import mmdcn.deploy.openvino  # noqa: F401
    except (ImportError, ConfigError) as error:
        left_out[name] = str(error)
    return name not in left_out


def _with_depths(settings: Settings, folder: Path) -> Iterator[Path]:
    """The configs; of other depths, files that inherit from them."""
    for path in settings.configs:
        for depth in settings.depths or (None,):
            if depth in (None, 50):
                yield path
                continue
            own = folder / f"{path.stem.replace('r50', f'r{depth}')}.py"
            own.write_text(
                f"_base_ = {str(path.resolve())!r}\n"
                f"model = dict(backbone=dict(depth={depth}, init_cfg=None),\n"
                f"             neck=dict(in_channels={_PYRAMIDS[depth]}))\n"
            )
            yield own


def _measured(
    path: Path, settings: Settings, folder: Path, left_out: dict[str, str]
) -> Iterator[dict]:
    """The entries of one config, one for each batch size."""
    network, files = None, {}
    for batch in settings.batches:
        options = detectors.Settings(
            [path], size=settings.size, batch=batch, offset_std=settings.offset_std
        )
        detector = detectors.Detector(path, "mmdcn", options)
        data = detector.data
        sizes = torch.tensor([sample.img_shape[:2] for sample in data["data_samples"]])
        inputs = data["inputs"], sizes
        if network is None:
            detector.prepare("inference")
            network = EndToEnd(copy.deepcopy(detector.model))
            files = dict(_written(network, inputs, settings, folder))
        with torch.no_grad():
            expected = network(*inputs)
        calls = {EAGER: detector.call("inference")}
        if set(IN_PYTORCH) & set(settings.runtimes):
            folded = fuse_conv_bn(copy.deepcopy(detector.model))
            folded = folded.to(memory_format=torch.channels_last)
        if "tuned" in settings.runtimes:
            tuned = _with_our_pooling(copy.deepcopy(folded))
            decoded = _without_gradients(EndToEnd(copy.deepcopy(tuned)), *inputs)
            _check(f"{path.stem}, tuned", network, expected, decoded(), False)
            calls["tuned"] = timing.Call(_without_gradients(tuned, **data, mode="predict"))
        for name, file in files.items():
            call = _of_file(file, inputs)
            _check(f"{path.stem} in {name}", network, expected, call(), settings.half)
            calls[name] = timing.Call(call)
        if "compiled" in settings.runtimes:
            with _noted("compiled", left_out):
                module = torch.compile(EndToEnd(folded), dynamic=False)
                compiled = _without_gradients(module, *inputs)
                compiled()
                _check(f"{path.stem}, compiled", network, expected, compiled(), False)
                calls["compiled"] = timing.Call(compiled)
        yield {
            "config": path.stem,
            "batch": batch,
            "detections": int((expected[1] > 0).sum()),
            "times": timing.interleave(calls, torch.device("cpu"), settings.budget),
        }


def _written(
    network: EndToEnd, inputs: tuple[Tensor, Tensor], settings: Settings, folder: Path
) -> Iterator[tuple[str, File]]:
    """The detector as a file in each runtime."""
    wanted = [name for name in settings.runtimes if name not in IN_PYTORCH]
    if not wanted:
        return
    path = folder / "model.onnx"
    one = tuple(value[:1] for value in inputs)
    try:
        export.export(network, [one], path, verify=False, half=settings.half)
    except ConfigError as error:
        raise BenchmarkError(f"--configs: {error}") from error
    if "onnxruntime" in wanted:
        yield "onnxruntime", File(path)
    if "openvino" in wanted:
        from mmdcn.deploy import openvino

        openvino.save(path, path.with_suffix(".xml"))
        yield "openvino", File(path.with_suffix(".xml"))


def _of_file(file: File, inputs: tuple[Tensor, Tensor]) -> Run:
    images, sizes = (value.numpy() for value in inputs)
    images = np.ascontiguousarray(images)
    return lambda: [torch.from_numpy(value) for value in file(images, sizes).values()]


def _with_our_pooling(detector: nn.Module) -> nn.Module:
    """A detector whose RoI Align is the same by our operator, as one line of its config has it."""
    for module in detector.modules():
        if isinstance(module, SingleRoIExtractor):
            layers = [
                DeformRoIPool(layer.output_size, layer.spatial_scale, layer.sampling_ratio)
                for layer in module.roi_layers
            ]
            module.roi_layers = nn.ModuleList(layers)
    return detector


def _without_gradients(function: Callable, *args: Any, **kwargs: Any) -> Run:
    def call() -> list:
        with torch.no_grad():
            return list(function(*args, **kwargs))

    return call


@contextlib.contextmanager
def _noted(name: str, left_out: dict[str, str]) -> Iterator[None]:
    """Note why something cannot be measured, in the place of an error."""
    try:
        yield
    except BenchmarkError:
        raise
    # The compiler's errors have no common ancestor.
    except Exception as error:
        left_out[name] = named_first_line(error)


def _check(
    what: str, network: EndToEnd, expected: tuple[Tensor, ...], actual: list[Tensor], half: bool
) -> None:
    """Refuse to time what finds something else than PyTorch."""
    matches = Matches(tolerance=HALF if half else SINGLE)
    try:
        matches.add(network.output_names, expected, actual)
        matches.check()
    except ConfigError as error:
        raise BenchmarkError(f"{what}: {error}. Wrong results are not timed.") from error
