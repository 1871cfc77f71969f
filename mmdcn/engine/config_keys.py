"""The first parts of a config's keys, for settings that nobody reads: misspelt, or read too early.

``data_root`` of a config, say, is a variable of its file, of which the data sets have taken the
value when the file was read: to set it afterwards changes nothing.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

__all__ = ["warn_of_unknown"]

# What the runner and the tools read of a config, which need not be in it.
_READ = (
    *("activation_checkpointing", "auto_scale_lr", "compile", "cudnn_benchmark", "custom_hooks"),
    *("custom_imports", "data_preprocessor", "default_hooks", "default_scope", "env_cfg"),
    *("efficient_conv_bn_eval", "experiment_name", "find_unused_parameters", "launcher"),
    *("load_from", "log_level", "log_processor", "model", "model_wrapper_cfg", "optim_wrapper"),
    *("param_scheduler", "preflight", "randomness", "resume", "runner_type", "strategy"),
    *("sync_bn", "test_cfg", "test_dataloader", "test_evaluator", "train_cfg"),
    *("train_dataloader", "tta_model", "tta_pipeline", "val_cfg", "val_dataloader"),
    *("val_evaluator", "visualizer", "work_dir"),
)


def warn_of_unknown(cfg: Config, settings: Iterable[str]) -> None:
    """Warn of settings whose first part nothing reads, whether the config has it or not.

    Args:
        cfg: the config before the settings.
        settings: keys such as ``model.backbone.depth``.
    """
    for key in settings:
        first = key.partition(".")[0]
        if first in _READ:
            continue
        if first in cfg:
            places = [place for place in _places(cfg.to_dict(), first, "") if place != first]
            hint = f": set {_listed(places)}" if places else ", and what has its value is to be set"
            reason = f"its parts have taken the value of {first!r} already{hint}"
        else:
            known = [*dict.fromkeys([*cfg.keys(), *_READ])]
            close = difflib.get_close_matches(first, known, n=1)
            hint = f": did you mean {key.replace(first, close[0], 1)!r}?" if close else ""
            reason = f"the config has no {first!r}{hint}"
        print_log(
            f"--cfg-options: {key!r} changes nothing, unless the config's own code reads it, as "
            f"{reason}",
            logger="current",
            level=logging.WARNING,
        )


def _places(node: Any, name: str, where: str) -> Iterator[str]:
    """The keys that end in a name, as ``--cfg-options`` takes them."""
    if not isinstance(node, Mapping | list | tuple):
        return
    for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
        place = f"{where}.{key}" if where else str(key)
        if key == name:
            yield place
        yield from _places(child, name, place)


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more
