"""Whole detectors of torchvision, plain and converted, as mmdet need not be installed."""

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from mmdcn import timing
from mmdcn.errors import named_first_line
from mmdcn.layers import DeformConv2dPack, ModulatedDeformConv2dPack

from .. import memory
from ..random_weights import spread_offsets
from .sections import Case, NotRun
from .settings import Settings, synchronise

# The layers that take the place of the 3×3 convolutions of c3 to c5.
_LAYERS = {"plain": None, "DCN": DeformConv2dPack, "DCNv2": ModulatedDeformConv2dPack}
_CONVOLUTIONS = "backbone.body.layer[234].*.conv2"
_BOXES_PER_IMAGE = 8


def cases(settings: Settings) -> list[Case]:
    """Images per second, in mixed precision, of all detectors in turns."""
    batches = (1,) if settings.tiny else (2, 8, 1)
    return [
        Case(f"Faster R-CNN R-50 FPN, batch {batch}", functools.partial(_time, settings, batch))
        for batch in batches
    ]


class Detector:
    """torchvision's Faster R-CNN with random weights and a random batch, that never changes."""

    def __init__(self, settings: Settings, batch: int, layer: type[nn.Module] | None) -> None:
        from torchvision.models.detection import fasterrcnn_resnet50_fpn

        from mmdcn.models import convert_to_deformable

        height, width = (64, 96) if settings.tiny else (800, 1333)
        self.device = settings.target
        torch.manual_seed(0)
        model = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, min_size=height, max_size=width
        )
        if layer is not None:
            convert_to_deformable(model, {"type": layer}, _CONVOLUTIONS)
        spread_offsets(model, offset_std=2.0)
        self.model = model.to(self.device)
        self.images = [torch.rand(3, height, width, device=self.device) for _ in range(batch)]
        corner = torch.rand(_BOXES_PER_IMAGE, 2) * torch.tensor([width / 2, height / 2])
        size = torch.rand(_BOXES_PER_IMAGE, 2) * torch.tensor([width / 3, height / 3]) + 8
        target = {
            "boxes": torch.cat([corner, corner + size], dim=1).to(self.device),
            "labels": torch.randint(1, 91, (_BOXES_PER_IMAGE,)).to(self.device),
        }
        self.targets = [target] * batch
        # A step that changes nothing, so that every iteration is the same.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    def _autocast(self):
        on_cuda = self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.float16 if on_cuda else torch.bfloat16)

    def train(self) -> torch.Tensor:
        torch.manual_seed(0)  # so that the same boxes are sampled
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            losses = self.model(self.images, self.targets)
        loss = sum(losses.values())
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def infer(self) -> list:
        with torch.no_grad(), self._autocast():
            return self.model(self.images)

    def call(self, phase: str, operator: Callable | None = None) -> timing.Call:
        """A call; `operator` takes the place of our deform_conv2d in its layers."""
        step = self.train if phase == "training" else self.infer
        prepare = functools.partial(self.model.train, phase == "training")
        if operator is None:
            return timing.Call(step, prepare=prepare)

        def by_operator() -> object:
            function = staticmethod(operator)
            with (
                mock.patch.object(DeformConv2dPack, "_function", function),
                mock.patch.object(ModulatedDeformConv2dPack, "_function", function),
            ):
                return step()

        return timing.Call(by_operator, prepare=prepare)


def _time(settings: Settings, batch: int) -> dict:
    try:
        from torchvision.ops import deform_conv2d as of_torchvision
    # A broken installation may raise anything.
    except Exception as error:
        raise NotRun(f"torchvision does not load: {named_first_line(error)}") from error
    detectors = {name: Detector(settings, batch, layer) for name, layer in _LAYERS.items()}
    row = {"batch": batch, "images_per_second": {}, "training_mb": {}, "left_out": {}}
    for phase in ("training", "inference"):
        calls = {name: detector.call(phase) for name, detector in detectors.items()}
        for name in ("DCN", "DCNv2"):
            theirs = detectors[name].call(phase, of_torchvision)
            try:
                theirs.prepare()
                theirs.function()
                synchronise(settings.target)
                calls[f"{name}, torchvision's operator"] = theirs
            except RuntimeError as error:
                row["left_out"][f"{name}, torchvision's operator"] = named_first_line(error)
        samples = timing.interleave(calls, settings.target, _budget(settings))
        row["images_per_second"][phase] = {
            name: 1000 * batch / timing.median(taken) for name, taken in samples.items()
        }
    if settings.device == "cuda":
        for name, detector in detectors.items():
            detector.model.train()
            row["training_mb"][name] = memory.cuda_peak(detector.train) / 1e6
    return row


def _budget(settings: Settings) -> timing.Budget:
    return settings.budget if settings.tiny else timing.Budget(seconds=0.5, fewest=5, most=9)
