"""The first parts of a config's keys, for settings that are misspelt so that nobody reads them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from mmengine.config import Config
from mmengine.logging import print_log

__all__ = ["warn_of_unknown"]

# What the runner and the tools read of a config, which need not be in it.
_READ = (
    *("activation_checkpointing", "auto_scale_lr", "compile", "cudnn_benchmark", "custom_hooks"),
    *("custom_imports", "data_preprocessor", "default_hooks", "default_scope", "env_cfg"),
    *("experiment_name", "find_unused_parameters", "launcher", "load_from", "log_level"),
    *("log_processor", "model", "model_wrapper_cfg", "optim_wrapper", "param_scheduler"),
    *("preflight", "randomness", "resume", "runner_type", "strategy", "sync_bn", "test_cfg"),
    *("test_dataloader", "test_evaluator", "train_cfg", "train_dataloader", "tta_model"),
    *("tta_pipeline", "val_cfg", "val_dataloader", "val_evaluator", "visualizer", "work_dir"),
)


def warn_of_unknown(cfg: Config, settings: Iterable[str]) -> None:
    """Warn of settings whose first part neither the config has nor anything reads.

    Args:
        cfg: the config before the settings.
        settings: keys such as ``model.backbone.depth``.
    """
    known = [*dict.fromkeys([*cfg.keys(), *_READ])]
    for key in settings:
        first = key.partition(".")[0]
        if first in known:
            continue
        close = difflib.get_close_matches(first, known, n=1)
        hint = f": did you mean {key.replace(first, close[0], 1)!r}?" if close else ""
        print_log(
            f"--cfg-options: {key!r} changes nothing, unless the config's own code reads it, as "
            f"the config has no {first!r}{hint}",
            logger="current",
            level=logging.WARNING,
        )
