"""Checks of a config before anything is built from it, so that a mistake costs a second.

Each check finds what the toolbox would report late, deep inside a traceback, or never: missing
files, classes on which the heads, the data and the checkpoint do not agree, annotations that cannot
be trained on, layer types that nobody registered.

:mod:`~.model`        the model's types and its heads' numbers of classes
:mod:`~.dataset`      the files of each data set, and its class list
:mod:`~.evaluators`   the files that predictions are compared with
:mod:`~.annotations`  the objects and images in a COCO file, which :mod:`~.coco_file` reads
:mod:`~.building`     whether the model, the optimizer and the loaders of data can be built
:mod:`~.parts`        transforms, hooks, evaluators and what they wait for
:mod:`~.weights`      the checkpoint against the model that is to take it
:mod:`~.determinism`  layers whose results differ from run to run
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdcn.errors import InputError
from mmdcn.files import unwritable
from mmdcn.startup import is_first_process

from .building import (
    CannotBuild,
    build_without_memory,
    optimizer_problems,
    setting_problems,
)
from .channels import channel_problems
from .dataset import Data, category_order, data_of, dataset_problems, root_is_absent
from .determinism import determinism_problems
from .evaluators import evaluator_problems, ground_truth_of
from .model import class_counts, missing_types, pretrained
from .nodes import Problems, each, is_local, missing_file, missing_weights, said, some
from .parts import mask_problems, part_problems
from .weights import checkpoint_problems, names_classes, trained_classes

__all__ = [
    "ConfigError",
    "check",
    "check_weights",
    "class_names",
    "names_classes",
    "register_toolbox",
    "trained_classes",
]

# What `preflight=dict(...)` in a config switches off, where something differs on purpose.
_SWITCHES = ("annotations", "checkpoint", "class_counts", "model")


class ConfigError(InputError, ValueError):
    """The config, or what it points to, cannot work. The message lists each problem on a line."""


def check(cfg: Config, stages: tuple[str, ...]) -> list[str]:
    """Check what `cfg` refers to, without running anything of it.

    ``preflight=dict(class_counts=False)`` in the config says that classes differ on purpose, and
    in the same way ``annotations``, ``checkpoint`` and ``model``, whether it can be built, leave
    out what takes seconds. In a distributed run the first process alone does those three.

    Args:
        cfg: a detector's config.
        stages: the parts that will run, of ``"train"``, ``"val"`` and ``"test"``. The first must be
            there; others are skipped where the config leaves them out.

    Returns:
        What was warned of, which is logged as well.

    Raises:
        ConfigError: an annotation file, image folder or checkpoint is missing, or the work folder
            cannot be written; the annotations would stop a run or spoil what it learns; the heads,
            the data sets, their class lists and the checkpoint do not agree on the classes; a type
            in the model is registered nowhere; a layer has no deterministic gradient where the
            config asks for one.
        UnsafeCheckpointError: the checkpoint is damaged, or holds more than plain data.
    """
    register_toolbox()
    said.clear()
    places: dict[str, list[str]] = {}
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        for where, problem in _problems(cfg, stages):
            places.setdefault(problem, []).append(where)
        if not places and is_first_process():
            for where, problem in _problems_of_weights(cfg, stages):
                places.setdefault(problem, []).append(where)
    if places:
        listing = "".join(f"\n  - {problem} ({', '.join(p)})" for problem, p in places.items())
        raise ConfigError(f"the config {cfg.filename} cannot run:{listing}")
    return list(said)


def check_weights(cfg: Config, checkpoint: str) -> None:
    """Check that a checkpoint fills the whole model of a config, for tools that read no data set.

    ``preflight=dict(checkpoint=False)`` in the config leaves it out.

    Raises:
        ConfigError: weights of the model are missing in the checkpoint, or of other shapes.
        UnsafeCheckpointError: the checkpoint is damaged, or holds more than plain data.
    """
    if not _is_on(cfg, "checkpoint"):
        return
    register_toolbox()
    asked = Config({"model": cfg.model, "load_from": checkpoint})
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        try:
            model = build_without_memory(asked)
        except CannotBuild as error:
            raise ConfigError("{}: {}".format(*error.args)) from error
        problems = [problem for _, problem in checkpoint_problems(asked, model, None, False)]
    if problems:
        raise ConfigError("; ".join(problems))


def class_names(cfg: Config) -> list[str] | None:
    """The names of the classes of a config's test set, where they are known without reading it."""
    register_toolbox()
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        loader = cfg.get("test_dataloader") or {}
        data = next(data_of(loader.get("dataset"), "test_dataloader.dataset"), None)
        return None if data is None else data.classes


def register_toolbox() -> None:
    """Fill the toolbox's registries, in which names in a config resolve."""
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)


def _is_on(cfg: Config, switch: str) -> bool:
    return bool((cfg.get("preflight") or {}).get(switch, True))


def _problems(cfg: Config, stages: tuple[str, ...]) -> Problems:
    unknown = [key for key in cfg.get("preflight") or {} if key not in _SWITCHES]
    if unknown:
        yield "preflight", f"expected some of {some(_SWITCHES)}, got {some(unknown)}"
    absent = [key for key in ("model", f"{stages[0]}_dataloader") if key not in cfg]
    if absent:
        yield from ((key, "it has no such entry") for key in absent)
        return
    if isinstance(cfg.get("work_dir"), str) and (problem := unwritable(cfg.work_dir)):
        yield "work_dir", problem
    yield from missing_types(cfg.model, "model")
    yield from setting_problems(cfg, stages)
    evaluators = [metric for stage in stages for metric in _evaluators(cfg, stage)]
    yield from part_problems(cfg, stages, evaluators)
    resumes = "train" in stages and cfg.get("resume")
    checkpoints = [("resume" if resumes else "load_from", cfg.get("load_from"))]
    if "train" in stages:
        checkpoints += pretrained(cfg.model, "model")
    for where, path in checkpoints:
        if isinstance(path, str):
            yield from missing_weights(path, where)
    absent_roots = set()
    known = []
    for data in _all_data(cfg, stages):
        if root_is_absent(data):
            absent_roots.add(data.root)
            yield (
                f"{data.where}.data_root",
                f"no folder {data.root!r}: put or link the data there, or change data_root and the "
                "ann_file of the evaluators",
            )
        else:
            reads = _is_on(cfg, "annotations") and is_first_process()
            problems = list(dataset_problems(data, reads))
            yield from problems
            known += [] if problems else [data]
    for stage in stages:
        for metric, where in _evaluators(cfg, stage):
            ann_file = metric.get("ann_file")
            if (
                isinstance(ann_file, str)
                and is_local(metric, ann_file)
                and not any(ann_file.startswith(root) for root in absent_roots)
            ):
                yield from missing_file(ann_file, f"{where}.ann_file")
        if _is_on(cfg, "annotations") and is_first_process():
            of_stage = [data for data in known if data.where.startswith(f"{stage}_dataloader.")]
            yield from evaluator_problems(of_stage, _evaluators(cfg, stage))
    if _is_on(cfg, "class_counts"):
        yield from _disagreements(cfg.model, known, evaluators)


def _all_data(cfg: Config, stages: tuple[str, ...]) -> list[Data]:
    """The data sets of all stages that run, in the order of the stages."""
    found = []
    for stage in stages:
        loader = cfg.get(f"{stage}_dataloader")
        if loader is not None and cfg.get(f"{stage}_cfg") is not None:
            evaluators = [metric for metric, _ in _evaluators(cfg, stage)]
            place = f"{stage}_dataloader.dataset"
            found += data_of(loader.get("dataset"), place, evaluators, stage == "train")
    return found


def _evaluators(cfg: Config, stage: str) -> list[tuple[Mapping, str]]:
    if cfg.get(f"{stage}_dataloader") is None or cfg.get(f"{stage}_cfg") is None:
        return []
    return list(each(cfg.get(f"{stage}_evaluator"), f"{stage}_evaluator"))


# ---------------------------------------------------------------------------------------------
# Classes


def _disagreements(
    model: Any, data_sets: list[Data], evaluators: list[tuple[Mapping, str]]
) -> Problems:
    """Where the heads, the data sets and the evaluators do not speak of the same classes."""
    for place, argument, count in class_counts(model, "model"):
        others: dict[int, list[str]] = {}
        for data in data_sets:
            number = data.number_of(argument)
            if number not in (None, count):
                others.setdefault(number, []).append(data.where)
        for number, where in others.items():
            has = "has" if len(where) == 1 else "have"
            yield (
                place,
                f"{count} classes, but {' and '.join(where)} {has} {number}: set "
                f"{argument}={number}, or metainfo=dict(classes=(...)) of every data set, or "
                "preflight=dict(class_counts=False) if they differ on purpose",
            )
    first = next((data for data in data_sets if data.number_of("num_classes") is not None), None)
    if first is None:
        return
    for data in data_sets:
        # Where numbers differ, the heads' problems say so.
        if data.classes is not None and len(data.classes) == len(first.classes):
            yield from _other_names(data, first)
    if first.reads_coco_json and first.ann_file and os.path.isfile(first.ann_file):
        files = [(f"{d.where}.ann_file", d.ann_file) for d in data_sets if d.reads_coco_json]
        for metric, where in evaluators:
            if path := ground_truth_of(metric):
                files.append((f"{where}.ann_file", path))
        yield from _other_orders(first, files)


def _other_names(data: Data, first: Data) -> Problems:
    extra = [name for name in data.classes if name not in first.classes]
    if extra:
        yield (
            f"{data.where}.metainfo.classes",
            f"{some(extra)} not among the classes of {first.where}, which are "
            f"{some(first.classes)}",
        )


def _other_orders(first: Data, files: list[tuple[str, str | None]]) -> Problems:
    """Files whose categories come in another order, in which labels count them."""
    orders: dict[str, list[str]] = {}
    for path in [first.ann_file, *(path for _, path in files)]:
        if path is not None and path not in orders and os.path.isfile(path):
            try:
                orders[path] = category_order(path, first.classes)
            except ValueError:
                continue  # said elsewhere of a data set's file
    expected = orders.get(first.ann_file)
    for where, path in files:
        order = orders.get(path)
        if expected and order and order != expected:
            yield (
                where,
                f"the categories of {path!r} come in another order than those of "
                f"{first.ann_file!r}, and labels count in that order: {some(order)}, and "
                f"{some(expected)}",
            )


def _problems_of_weights(cfg: Config, stages: tuple[str, ...]) -> Problems:
    """What is seen only on a model that is built."""
    try:
        model = build_without_memory(cfg)
    except CannotBuild as error:
        if _is_on(cfg, "model"):
            yield error.args
        return
    if _is_on(cfg, "model"):
        yield from channel_problems(model, cfg.model)
        yield from mask_problems(model, [e for s in stages for e in _evaluators(cfg, s)])
    data = next(iter(_all_data(cfg, stages)), None)
    if _is_on(cfg, "checkpoint"):
        classes = data.classes if data is not None and _is_on(cfg, "class_counts") else None
        yield from checkpoint_problems(cfg, model, classes, is_training="train" in stages)
    if "train" in stages:
        yield from optimizer_problems(cfg, model)
        if (cfg.get("randomness") or {}).get("deterministic"):
            yield from determinism_problems(model)
