"""Checks by building: the model, the optimizer and what reads the data, without their memory.

An error there becomes one sentence that names the place in the config.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn
from torch.utils.data import DataLoader

from mmdcn.errors import did_you_mean, first_line

from .nodes import Problems, children, join

# What building raises where values are wrong. Others may come of the device without memory.
MISTAKES = (TypeError, ValueError, KeyError, AttributeError, AssertionError)
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_LOADER_SETTINGS = (
    *("batch_size", "num_workers", "persistent_workers", "prefetch_factor", "timeout", "drop_last"),
    "pin_memory",
)
_NUMBERS = ("lr", "weight_decay", "momentum", "max_norm")
_LENGTHS = ("max_epochs", "max_iters", "val_interval", "val_begin")


class CannotBuild(Exception):
    """The model cannot be built; the arguments are the place in the config, and why."""


def build_without_memory(cfg: Config) -> nn.Module:
    """The model of a config on the meta device.

    Raises:
        CannotBuild: building it fails, on the CPU too.
    """
    from mmdet.registry import MODELS

    with _process_group(cfg):
        with contextlib.suppress(Exception), torch.device("meta"), silence():
            # mmcv's own layers are made of torch.Tensor(…), which takes no device from a context.
            return MODELS.build(copy.deepcopy(cfg.model)).to("meta")
        # Some compute with values while they are built, such as the rates of Swin's paths.
        node = copy.deepcopy(cfg.model)
        try:
            with silence():
                return MODELS.build(node).to("meta")
        except Exception as error:
            said = sentence(error)
            if "init_process_group" in said:
                said = (
                    f"it is for distributed runs alone (tools/dist_train.sh, "
                    f"tools/dist_test.sh): {said}"
                )
            raise CannotBuild(_place(error, node), said) from error


@contextlib.contextmanager
def _process_group(cfg: Config) -> Iterator[None]:
    """A process group of this process alone where the run will have one of all.

    Some layers ask it for its size while they are built, such as mmcv's ``MMSyncBN``. The run's
    own is made with its runner, after the checks.
    """
    from torch import distributed

    if cfg.get("launcher", "none") == "none" or distributed.is_initialized():
        yield
        return
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Without what is said in building: it is said again when the run builds the same."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    _ask_anew_which_levels_are_on()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        _ask_anew_which_levels_are_on()


def _ask_anew_which_levels_are_on() -> None:
    """Let mmengine's loggers forget what they have cached, as those that logging knows of do."""
    for logger in MMLogger._instance_dict.values():
        logger._cache.clear()


def sentence(error: BaseException) -> str:
    """What an exception says, and where it says nothing the line that raised it."""
    if isinstance(error, KeyError) and error.args:
        # It says which key, or a sentence of its own.
        key = error.args[0]
        return key if isinstance(key, str) and " " in key else f"it lacks {key!r}"
    if str(error).strip():
        return first_line(error)
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if line.startswith("assert "):
        return f"expected {line.removeprefix('assert ')}"
    return f"{type(error).__name__} at {line!r}"


def _place(error: BaseException, model: Mapping) -> str:
    """The innermost part of the model that was being built."""
    places = {id(node): where for node, where in _parts(model, "model")}
    found = "model"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        node = frame.f_locals.get("cfg") if frame.f_code.co_name.startswith("build_") else None
        equal = (where for part, where in _parts(model, "model") if part == node)
        if isinstance(node, Mapping):
            found = places.get(id(node)) or next(equal, found)
    return found


def _parts(node: Any, where: str) -> Iterator[tuple[Mapping, str]]:
    if isinstance(node, Mapping):
        yield node, where
    for key, child in children(node):
        yield from _parts(child, join(where, key))


# ------------------------------------------------------------------------------------- settings


def setting_problems(cfg: Config, stages: tuple[str, ...]) -> Problems:
    """Numbers in the config that are none, as far as this is seen without building anything."""
    for name in _LOADERS:
        if name.partition("_")[0] in stages and isinstance(cfg.get(name), Mapping):
            yield from _loader_problems(cfg[name], name)
    seed = (cfg.get("randomness") or {}).get("seed")
    if seed is not None and not (type(seed) is int and seed >= 0):
        yield "randomness.seed", f"expected an int of at least 0 or None, got {seed!r}"
    if "train" not in stages:
        return
    for key in _LENGTHS:
        value = (cfg.get("train_cfg") or {}).get(key)
        low = int(key != "val_begin")
        if value is not None and not (type(value) is int and value >= low):
            yield f"train_cfg.{key}", f"expected an int of at least {low}, got {value!r}"
    yield from _no_numbers(cfg.get("optim_wrapper"), "optim_wrapper")


def _loader_problems(loader: Mapping, where: str) -> Problems:
    settings = {key: loader[key] for key in _LOADER_SETTINGS if loader.get(key) is not None}
    for key in ("batch_size", "num_workers"):
        low = int(key == "batch_size")
        value = settings.get(key, low)
        if type(value) is not int or value < low:
            yield f"{where}.{key}", f"expected an int of at least {low}, got {value!r}"
            return
    try:
        with silence():
            DataLoader(range(1), **settings)
    except MISTAKES as error:
        yield where, sentence(error)


def _no_numbers(node: Any, where: str) -> Problems:
    for key, child in children(node):
        place = join(where, key)
        is_number = isinstance(child, (int, float))
        expects = key in _NUMBERS or str(key).endswith("_mult")
        if expects and not (is_number or child is None):
            yield place, f"expected a number, got {child!r}"
        yield from _no_numbers(child, place)


def optimizer_problems(cfg: Config, model: nn.Module) -> Problems:
    """Why the optimizer, or the schedules of its learning rate, cannot be built for a model."""
    from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS

    if cfg.get("optim_wrapper") is None or "runner_type" in cfg:
        return
    name = (cfg.optim_wrapper.get("optimizer") or {}).get("type")
    if isinstance(name, str) and OPTIMIZERS.get(name) is None:
        hint = did_you_mean(name, OPTIMIZERS.module_dict)
        yield "optim_wrapper.optimizer.type", f"no optimizer named {name!r} is registered{hint}"
        return
    try:
        with silence():
            optimizer = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    except MISTAKES as error:
        yield "optim_wrapper", sentence(error)
        return
    except Exception:
        return  # of the device without memory
    schedules = cfg.get("param_scheduler") or []
    several = isinstance(schedules, (list, tuple))
    for index, schedule in enumerate(schedules if several else [schedules]):
        if not isinstance(schedule, Mapping) or not isinstance(optimizer, OptimWrapper):
            continue
        arguments = {k: v for k, v in schedule.items() if k != "convert_to_iter_based"}
        try:
            with silence():
                PARAM_SCHEDULERS.build({**arguments, "optimizer": optimizer})
        except MISTAKES as error:
            yield f"param_scheduler[{index}]" if several else "param_scheduler", sentence(error)
