"""Check of a config: its model with our layers against the same model with mmcv's.

A config is checked by building its model at full width, twice: with mmcv's layers, whose weights
are saved to a checkpoint, and with ours, which load it strictly. Both then compute the same
features and head outputs in float64; ours also trains one step and predicts, in float32.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmcv.ops import MaskedConv2d
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import BaseRoIExtractor
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.runner import load_checkpoint, save_checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdcn import plugin
from mmdcn.files import write
from mmdcn.machine import versions
from mmdcn.zoo.finding import Found, build, calls_operator, operators, parts, reason

IMAGE_SIZE = (128, 160)  # height and width in pixels
# v1 in heads on the coarsest level needs this: mmcv refuses inputs smaller than the kernel.
LARGER_IMAGE_SIZE = (384, 416)
# Tolerances of outputs, relative to the largest value of each, by its dtype: float64,
# unless a head insists on float32. mmcv looks for the pixels around a point in float32 in any case.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4}


@dataclass(frozen=True)
class Checked:
    """The result of checking a config.

    Args:
        forward: calls of our operator in one training step.
        backward: calls of its backward pass in that step.
        difference: the largest difference of an output from mmcv's, relative to the largest value
            of that output; None where mmcv's operator does not run.
        predicted: whether the model predicted as well; False where it needs another operator of
            mmcv's that has no kernel on a CPU.
        problem: what failed, or None.
    """

    forward: int = 0
    backward: int = 0
    difference: float | None = None
    predicted: bool = True
    problem: str | None = None


def check(found: Found) -> Checked:
    """Build, load, compare and train one config; see the module's docstring.

    The plugin is installed afterwards, whatever it was before.
    """
    try:
        try:
            return _check(found, IMAGE_SIZE)
        except RuntimeError as error:
            if "smaller than kernel" not in str(error):
                raise
        return _check(found, LARGER_IMAGE_SIZE)
    except Exception as error:  # One config's failure is a result among others.
        return Checked(problem=reason(error))
    finally:
        plugin.install()


def _check(found: Found, size: tuple[int, int]) -> Checked:
    with tempfile.TemporaryDirectory() as folder:
        expected = _outputs_of_mmcv(found.model, folder, size)
        plugin.install()
        model = build(found.model)
        for number, part in enumerate(parts(model)):
            load_checkpoint(part, f"{folder}/{number}.pth", map_location="cpu", strict=True)

    outputs = _outputs(model, size)
    difference = None
    if expected is not None:
        differences = [_difference(*pair) for pair in zip(outputs, expected, strict=True)]
        difference = max(differences)
        if not all(d <= TOLERANCES[o.dtype] for d, o in zip(differences, outputs)):
            return Checked(difference=difference, problem="its outputs differ from mmcv's")
    for part in parts(model):
        part.float()
    return _train_and_predict(model, size, difference)


def _outputs_of_mmcv(
    settings: ConfigDict, folder: str, size: tuple[int, int]
) -> list[Tensor] | None:
    """The outputs with mmcv's layers, None where these do not run; saves the model's weights."""
    plugin.uninstall()
    model = build(settings)
    for number, part in enumerate(parts(model)):
        for name, module in part.named_modules():
            # The layers' own branches start at zero: nothing would be deformed.
            predicts = isinstance(module, nn.Conv2d | nn.Linear) and "offset" in name
            if predicts and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)
        _calibrate(part, size)
        save_checkpoint({"state_dict": part.state_dict()}, f"{folder}/{number}.pth")
    try:
        return _outputs(model, size)
    except (RuntimeError, NotImplementedError) as error:
        if "implement" in str(error):  # mmcv says this of a device without a kernel.
            return None
        raise


def _calibrate(model: nn.Module, size: tuple[int, int]) -> None:
    """Where features overflow, set batch normalisation to statistics of its input."""
    images = torch.randn(2, 3, *size, generator=_generator())
    model.eval()
    with torch.no_grad():
        if all(feature.isfinite().all() for feature in _tensors(model.extract_feat(images))):
            return
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model.extract_feat(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _outputs(model: nn.Module, size: tuple[int, int]) -> list[Tensor]:
    """Features of backbone and neck, and what dense heads and deformable RoI pooling make of them.

    They are in float64, as far as the heads allow it.
    """
    outputs = []
    for part in parts(model):
        part.double().eval()
        images = torch.randn(2, 3, *size, dtype=torch.float64, generator=_generator())
        with torch.no_grad():
            features = part.extract_feat(images)
            samples = part.data_preprocessor(_data(size))["data_samples"]
            outputs += _tensors(features)
            for name in ("rpn_head", "bbox_head", "mask_head"):
                head = getattr(part, name, None)
                if isinstance(head, nn.Module):
                    outputs += _head_outputs(head, features, samples)
            for extractor in part.modules():
                if isinstance(extractor, BaseRoIExtractor) and operators(extractor):
                    boxes = samples[0].gt_instances.bboxes.double()
                    rois = nn.functional.pad(boxes, (1, 0))  # All RoIs lie in the first image.
                    outputs.append(extractor(features[: extractor.num_inputs], rois))
    return outputs


def _head_outputs(
    head: nn.Module, features: Sequence[Tensor], samples: list[DetDataSample]
) -> list[Tensor]:
    if type(head).forward is not nn.Module.forward:
        # Guided anchoring: computed everywhere in training, and by MaskedConv2d otherwise.
        return _tensors(head.train(_is_masked(head))(features))
    # Cascade RPN has no forward pass apart from its loss, where its anchors are float32: what its
    # parts return meanwhile.
    outputs = []
    handles = [
        module.register_forward_hook(lambda _, __, output: outputs.extend(_tensors(output)))
        for module in head.modules()
    ]
    head.float().loss([feature.float() for feature in features], samples)
    for handle in handles:
        handle.remove()
    return outputs


def _is_masked(model: nn.Module) -> bool:
    """Whether the model predicts by mmcv's MaskedConv2d, which has no kernel on a CPU."""
    return any(isinstance(module, MaskedConv2d) for module in model.modules())


def _data(size: tuple[int, int]) -> dict[str, list]:
    return demo_mm_inputs(2, [(3, *size)] * 2, num_classes=4, with_mask=True, with_semantic=True)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested] if nested.is_floating_point() and nested.numel() else []
    items = nested.values() if isinstance(nested, dict) else nested
    if isinstance(items, str) or not isinstance(items, Iterable):
        return []
    return [tensor for item in items for tensor in _tensors(item)]


def _difference(mine: Tensor, expected: Tensor) -> float:
    return ((mine - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def _train_and_predict(
    model: nn.Module, size: tuple[int, int], difference: float | None
) -> Checked:
    for progress in ("epoch", "iter"):  # Some losses depend on this value.
        MessageHub.get_current_instance().update_info(progress, 0)
    model.train()
    with _Calls() as calls:
        inputs = model.data_preprocessor(_data(size), training=True)
        loss, _ = model.parse_losses(model(**inputs, mode="loss"))
        loss.backward()
    problem = None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not loss.isfinite() or not all(gradient.isfinite().all() for gradient in gradients):
        problem = "its loss or gradients are not finite"
    elif not calls.forward or (not calls.backward and _learns_deformation(model)):
        problem = "its training step calls no operator of ours"
    predicted = not _is_masked(model)
    model.eval()
    with torch.no_grad():
        if predicted:
            model(**model.data_preprocessor(_data(size)), mode="predict")
    return Checked(calls.forward, calls.backward, difference, predicted, problem)


def _learns_deformation(model: nn.Module) -> bool:
    """Whether anything deformable is the model's own, not its teacher's."""
    return any(calls_operator(type(module)) for module in model.modules())


class _Calls(TorchDispatchMode):
    """Counts the calls of our operators and of their backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, _, name = function.overloadpacket._qualified_op_name.partition("::")
        if namespace == "mmdcn":
            if name.endswith("_backward"):
                self.backward += 1
            else:
                self.forward += 1
        return function(*args, **(kwargs or {}))


def sweep(found: Iterable[Found], results: Path) -> Iterator[tuple[Found, Checked]]:
    """Check configs one by one; configs that build the same model are checked once.

    Args:
        found: the configs.
        results: a JSON file of what was checked already, which an interrupted sweep goes on from;
            a model that passed in it is not checked again by the same versions.
    """
    known = json.loads(results.read_text()) if results.exists() else {}
    for config in found:
        key = f"{config.key} {tested_versions()}"
        if key not in known or known[key]["problem"]:
            known[key] = asdict(check(config))
            write(results, json.dumps(known, indent=1))
        yield config, Checked(**known[key])


def tested_versions() -> str:
    """The versions of everything that the results depend on."""
    found = versions("mmdcn", "mmdet", "mmcv", "mmengine", "torch")
    return ", ".join(f"{name} {version}" for name, version in found.items())
