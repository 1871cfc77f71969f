"""The common parts of the tools that read a config: arguments, config, runner, errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmdcn.engine.checkpoint import UnsafeCheckpointError
from mmdcn.engine.preflight import ConfigError

__all__ = [
    "add_arguments",
    "add_config_options",
    "build_runner",
    "load_config",
    "read_config",
    "run",
]


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of the config, named as in mmdet."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        metavar="KEY=VALUE",
        help="override settings of the config: model.backbone.depth=101, lists as key=a,b or "
        'key="[(a,b),(c,d)]" without spaces',
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, named as in mmdet."""
    add_config_options(parser)
    parser.add_argument(
        "--launcher",
        choices=["none", "pytorch", "slurm", "mpi"],
        default="none",
        help="what started the processes of a distributed run (tools/dist_*.sh pass pytorch)",
    )
    # torch.distributed.launch passes this one in either spelling.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config and override settings of it.

    Raises:
        ConfigError: the file, or one that it inherits from, is missing or is not a config.
    """
    if not os.path.isfile(path):
        raise ConfigError(f"no config file {path!r}")
    try:
        cfg = Config.fromfile(path)
    except (OSError, SyntaxError, ImportError, KeyError, ConfigParsingError) as error:
        raise ConfigError(f"cannot read the config {path}: {_describe(error)}") from error
    if options is not None:
        try:
            cfg.merge_from_dict(options)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"--cfg-options do not fit the config {path}: {_describe(error)}"
            ) from error
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply ``--cfg-options``, ``--work-dir`` and ``--launcher``.

    Raises:
        ConfigError: see :func:`read_config`.
    """
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = os.path.join("work_dirs", Path(args.config).stem)
    return cfg


def _describe(error: Exception) -> str:
    # str(KeyError) is the repr of its message.
    return str(error.args[0] if isinstance(error, KeyError) and error.args else error)


def on_cpu() -> bool:
    """Whether the toolbox will run on the CPU, because it finds no accelerator."""
    return get_device() == "cpu"


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner.

    A distributed run without an accelerator communicates through gloo: mmengine would set a CUDA
    device and wrap the model for one.

    Raises:
        ConfigError: the launcher needs an accelerator and there is none.
    """
    if cfg.launcher != "none" and on_cpu():
        if cfg.launcher != "pytorch":
            raise ConfigError(
                f"--launcher {cfg.launcher} needs a GPU; without one use --launcher pytorch, by "
                "tools/dist_train.sh or tools/dist_test.sh"
            )
        _init_gloo(cfg)
    return Runner.from_cfg(cfg) if "runner_type" not in cfg else RUNNERS.build(cfg)


def _init_gloo(cfg: Config) -> None:
    dist_cfg = cfg.get("env_cfg", {}).get("dist_cfg", {})
    timeout = dist_cfg.get("timeout")
    torch.distributed.init_process_group(
        "gloo", timeout=None if timeout is None else timedelta(seconds=timeout)
    )
    if cfg.get("model_wrapper_cfg") is None:
        cfg.model_wrapper_cfg = dict(
            type="MMDistributedDataParallel",
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get("find_unused_parameters", False),
        )


def run(main: Callable[[], None]) -> None:
    """Run a tool. A mistake in what it was given ends it with one message and exit status 1."""
    try:
        main()
    except (ConfigError, UnsafeCheckpointError) as error:
        # Every process of a distributed run comes here; one message is enough.
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
