"""Finder of mmdet's deformable configs: those whose model calls a deformable operator."""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import mmdet
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope
from torch import nn

from mmdcn.errors import named_first_line

FOLDER = Path(mmdet.__file__).parent / ".mim" / "configs"

#: The functions of mmcv.ops behind everything deformable; who calls one of them is deformable.
_FUNCTIONS = {"deform_conv2d", "modulated_deform_conv2d", "deform_roi_pool"}


@dataclass(frozen=True)
class Found:
    """A config whose model holds something deformable.

    Args:
        name: path below mmdet's configs.
        model: the model's settings, without what initialises it.
        operators: how many modules of each class call a deformable operator.
    """

    name: str
    model: ConfigDict
    operators: dict[str, int]

    @property
    def key(self) -> str:
        """The same for configs that build the same model."""
        text = json.dumps(self.model.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def find(pattern: str = "*/**/*.py", passed_over: dict[str, str] | None = None) -> Iterator[Found]:
    """The configs of mmdet, in a glob of its folder, that build something deformable.

    Each distinct model is built, without memory for its weights where that works.

    Args:
        pattern: which configs.
        passed_over: filled with the reason for each config that cannot be read or whose model
            cannot be built in this environment: a package or a language model is missing, say.
    """
    register_all_modules()
    passed_over = {} if passed_over is None else passed_over
    operators: dict[str, dict[str, int]] = {}
    for path in sorted(FOLDER.glob(pattern)):
        name = str(path.relative_to(FOLDER))
        if name.startswith("_base_"):
            continue
        try:
            model = Config.fromfile(path).get("model")
            if model is None:
                continue
            found = Found(name, _offline(model), {})
            if found.key not in operators:
                operators[found.key] = _operators_of(found.model)
        except Exception as error:  # The error depends on what is missing.
            passed_over[name] = reason(error)
            continue
        if operators[found.key]:
            yield replace(found, operators=operators[found.key])


def reason(error: Exception) -> str:
    """What an error says in its first line, short enough for a table."""
    return " ".join(named_first_line(error).replace(f"{FOLDER}/", "").split())


def _offline(node: Any) -> Any:
    """The settings without what initialises or is downloaded, or makes images large."""
    if isinstance(node, dict):
        left_out = ("init_cfg", "pretrained", "teacher_ckpt", "batch_augments")
        node = ConfigDict({k: _offline(v) for k, v in node.items() if k not in left_out})
        if "teacher_config" in node:  # The path is relative to the folder that holds configs/.
            node.teacher_config = _offline(Config.fromfile(FOLDER.parent / node.teacher_config))
        return node
    if isinstance(node, Config):
        return _offline(node._cfg_dict)
    return [_offline(child) for child in node] if isinstance(node, list) else node


def _operators_of(settings: ConfigDict) -> dict[str, int]:
    try:
        with torch.device("meta"):
            return operators(build(settings))
    except (NotImplementedError, RuntimeError):  # Some modules read values while they are built.
        return operators(build(settings))


def operators(model: nn.Module) -> dict[str, int]:
    """How many modules of each class call a deformable operator."""
    return dict(
        Counter(
            type(module).__name__
            for part in parts(model)
            for module in part.modules()
            if calls_operator(type(module)) and getattr(module, "use_deform", True)
        )
    )


def calls_operator(kind: type) -> bool:
    """Whether a method of the class calls one of mmcv's deformable functions."""
    return any(
        _FUNCTIONS.intersection(function.__code__.co_names)
        for base in kind.__mro__
        for function in vars(base).values()
        if isinstance(function, FunctionType)
    )


def parts(model: nn.Module) -> list[nn.Module]:
    """The model, and those that it hides from ``modules()``: a distilling detector's teacher."""
    hidden = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, nn.Module)
    ]
    return [model, *hidden]


def build(settings: ConfigDict) -> nn.Module:
    """The model of these settings, with the same random weights each time."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(copy.deepcopy(settings))
