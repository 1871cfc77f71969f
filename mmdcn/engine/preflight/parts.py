"""Checks of a run's small parts: transforms, hooks, evaluators, backends of the visualizer.

The toolbox builds them after the model, and asks some of them for the first time when an epoch has
been trained. Transforms, COCO's metric and mmdcn's hooks are built here; of the others, which may
begin something, the arguments are held against their signatures.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, METRICS, TRANSFORMS, VISBACKENDS, Registry
from mmengine.runner import Runner
from torch import nn

from mmdcn.errors import did_you_mean

from .building import MISTAKES, sentence, silence
from .nodes import Problems, children, class_of, each, join, some

_PACKAGES = ("mmdet", "mmcv", "mmengine", "mmdcn")
_COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
_PROPOSAL_ITEMS = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")


def part_problems(
    cfg: Config, stages: Sequence[str], evaluators: list[tuple[Mapping, str]]
) -> Problems:
    """Small parts of a run that cannot be built.

    Args:
        cfg: the config.
        stages: those that run.
        evaluators: of these stages, with their places.
    """
    for stage in stages:
        loader = cfg.get(f"{stage}_dataloader") or {}
        pipelines = list(_pipelines(loader.get("dataset"), f"{stage}_dataloader.dataset"))
        for steps, where in pipelines:
            for step, place in each(steps, where):
                yield from _transform_problems(step, place)
        yield from _packing_problems(pipelines)
    for metric, where in evaluators:
        problems = list(_argument_problems(METRICS, metric, where)) if "type" in metric else []
        yield from problems
        if _is_coco(metric) and not problems:
            yield from _building_problems(METRICS, {**metric, "ann_file": None}, where)
    for hook, where in _hooks(cfg):
        problems = list(_argument_problems(HOOKS, hook, where, given=("priority",)))
        if not problems and _is_ours(hook):
            hook = {key: value for key, value in hook.items() if key != "priority"}
            problems = list(_building_problems(HOOKS, hook, where))
        yield from problems
    backends = (cfg.get("visualizer") or {}).get("vis_backends")
    for backend, where in each(backends, "visualizer.vis_backends"):
        yield from _argument_problems(VISBACKENDS, backend, where, is_whole=False)
    if "train" in stages:
        yield from _monitor_problems(cfg, [m for m, w in evaluators if w.startswith("val_")])


def mask_problems(model: nn.Module, evaluators: Sequence[tuple[Mapping, str]]) -> Problems:
    """Evaluators of masks, where nothing in a model speaks of masks."""
    names = (f"{name} {type(module).__name__}" for name, module in model.named_modules())
    if any("mask" in name.lower() or "Ins" in name for name in names):
        return
    for metric, where in evaluators:
        if _is_coco(metric) and "segm" in _metrics_of(metric):
            yield f"{where}.metric", "'segm' compares masks, and the model predicts none"


def _pipelines(node: Any, where: str) -> Iterator[tuple[list, str]]:
    """The lists of transforms of a data set, and of those inside it."""
    if isinstance(node, Mapping) and isinstance(node.get("pipeline"), (list, tuple)):
        yield node["pipeline"], f"{where}.pipeline"
    for key, child in children(node):
        if key in ("dataset", "datasets") or isinstance(key, int):
            yield from _pipelines(child, join(where, key))


def _packing_problems(pipelines: Sequence[tuple[list, str]]) -> Problems:
    """Pipelines of the toolbox's own transforms, none of which packs what the model takes."""
    kinds = [kind for steps, _ in pipelines for kind in _transforms_in(steps)]
    ours = all(kind.__module__.partition(".")[0] in _PACKAGES for kind in kinds)
    if kinds and ours and not any("Pack" in kind.__name__ for kind in kinds):
        end = "end it with dict(type='PackDetInputs')"
        yield pipelines[0][1], f"no transform packs inputs and data_samples: {end}"


def _transforms_in(node: Any) -> Iterator[type]:
    """The classes of transforms, and of those inside them."""
    if isinstance(node, Mapping) and (kind := class_of(node, TRANSFORMS)) is not None:
        yield kind
    for _, child in children(node):
        yield from _transforms_in(child)


def _hooks(cfg: Config) -> Iterator[tuple[Mapping, str]]:
    for key, hook in (cfg.get("default_hooks") or {}).items():
        yield from each(hook, f"default_hooks.{key}")
    yield from each(cfg.get("custom_hooks"), "custom_hooks")


def _is_ours(hook: Mapping) -> bool:
    kind = class_of(hook, HOOKS)
    return kind is not None and kind.__module__.partition(".")[0] == "mmdcn"


# ------------------------------------------------------------------------------------------------
# Types and arguments


def _transform_problems(step: Mapping, where: str) -> Problems:
    problems = list(_argument_problems(TRANSFORMS, step, where))
    yield from problems or _building_problems(TRANSFORMS, step, where)


def _building_problems(registry: Registry, node: Mapping, where: str) -> Problems:
    try:
        with silence():
            registry.build(copy.deepcopy(dict(node)))
    except MISTAKES as error:
        yield where, sentence(error)
    except Exception:
        return  # of what is not there before the run, or of a package: the run says it


def _argument_problems(
    registry: Registry,
    node: Mapping,
    where: str,
    given: Sequence[str] = (),
    is_whole: bool = True,
) -> Problems:
    """Where a type is registered nowhere, or does not have an argument.

    Args:
        registry: where the type is looked for.
        node: the type and its arguments.
        where: its place.
        given: arguments of whoever builds it.
        is_whole: whether all that it requires has to be there.
    """
    kind = node.get("type")
    if isinstance(kind, str):
        name = kind
        with registry.switch_scope_and_registry(None) as scoped:
            kind = scoped.get(name)
            known = {*scoped.module_dict, *registry.module_dict}
        if kind is None:
            hint = did_you_mean(name, known)
            yield f"{where}.type", f"no {registry.name} named {name!r} is registered{hint}"
            return
    if kind is None:
        yield where, "it has no 'type'"
        return
    arguments = {k: v for k, v in node.items() if k not in ("type", "_scope_", *given)}
    try:
        signature = inspect.signature(kind)
    except (TypeError, ValueError):
        return
    if inspect.isclass(kind) and issubclass(kind, CheckpointHook):
        # It hands on what it does not know, and nobody sees it until there is something to save.
        taken = [*signature.parameters, *inspect.signature(Runner.save_checkpoint).parameters]
        for key in arguments:
            if key not in taken:
                hint = did_you_mean(key, taken)
                yield where, f"{kind.__name__}: unexpected keyword argument {key!r}{hint}"
    try:
        (signature.bind if is_whole else signature.bind_partial)(**arguments)
    except TypeError as error:
        unknown = [key for key in arguments if key not in signature.parameters]
        hint = did_you_mean(unknown[0], signature.parameters) if unknown else ""
        yield where, f"{getattr(kind, '__name__', kind)}: {error}{hint}"


# ------------------------------------------------------------------------------------------------
# Results that others wait for


def _is_coco(metric: Mapping) -> bool:
    return str(metric.get("type")).rpartition(".")[2] == "CocoMetric"


def _metrics_of(metric: Mapping) -> list:
    value = metric.get("metric", "bbox")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _results(metric: Mapping) -> Iterator[str]:
    """The names of what COCO's metric gives, but for those of classes."""
    prefix = metric.get("prefix") or "coco"
    for kind in _metrics_of(metric):
        if kind == "proposal_fast":
            yield from (f"{prefix}/AR@{n}" for n in metric.get("proposal_nums", (100, 300, 1000)))
        elif kind == "proposal":
            yield from (f"{prefix}/{i}" for i in metric.get("metric_items") or _PROPOSAL_ITEMS)
        else:
            items = metric.get("metric_items") or _COCO_ITEMS
            yield from (f"{prefix}/{kind}_{item}" for item in items)


def _monitor_problems(cfg: Config, evaluators: Sequence[Mapping]) -> Problems:
    """Results by which the best checkpoint or an end is chosen, and that no evaluator gives."""
    usual = [m for m in evaluators if _is_coco(m) and not m.get("format_only")]
    if not usual or len(usual) < len(evaluators):
        return
    known = [name for metric in usual for name in _results(metric)]
    classwise = any(metric.get("classwise") for metric in usual)
    for hook, where in _hooks(cfg):
        for key in ("save_best", "monitor"):
            wanted = hook.get(key)
            for name in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
                if not isinstance(name, str) or name in ("auto", *known):
                    continue
                if classwise and name.endswith("_precision"):
                    continue
                hint = did_you_mean(name, known)
                yield (
                    f"{where}.{key}",
                    f"no result of the evaluation is called {name!r}{hint} (it gives "
                    f"{some(known)})",
                )
