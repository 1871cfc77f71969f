"""Training of a detector from a config of mmdet's, or one of this project's."""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import launch

# isort: split
import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=launch.config_file, help="config file")
    parser.add_argument(
        "--work-dir",
        help="folder for logs and checkpoints (default: work_dirs/<config name>)",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="train in mixed precision: float16 on a GPU, bfloat16 on the CPU",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate by the batch size, relative to auto_scale_lr.base_batch_size",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        type=launch.resumed_checkpoint,
        metavar="CHECKPOINT",
        help="continue from a checkpoint; without a path, from the last one in the work folder",
    )
    launch.add_arguments(parser)
    args = parser.parse_args()
    if args.work_dir is not None:
        files.check_folder(Path(args.work_dir), "--work-dir")
    return args


def scale_learning_rate(cfg: Config) -> None:
    from mmdcn.engine import preflight

    if not {"enable", "base_batch_size"} <= set(cfg.get("auto_scale_lr") or {}):
        raise preflight.ConfigError(
            "--auto-scale-lr: the config must have auto_scale_lr=dict(enable=False, "
            "base_batch_size=...), the batch size that its learning rate was chosen for"
        )
    cfg.auto_scale_lr.enable = True


def resume(cfg: Config, path: str) -> None:
    cfg.resume = True
    cfg.load_from = None if path == "auto" else path


def main(args: argparse.Namespace) -> None:
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    from mmdcn.engine import amp, preflight

    setup_cache_size_limit_of_dynamo()
    cfg = launch.load_config(args)
    if args.amp:
        amp.enable(cfg, on_cpu=launch.on_cpu())
    if args.auto_scale_lr:
        scale_learning_rate(cfg)
    if args.resume is not None:
        resume(cfg, args.resume)
    warned = preflight.check(cfg, stages=("train", "val"))
    launch.build_runner(cfg, warned).train()


if __name__ == "__main__":
    launch.run(
        main,
        parse_args,
        when_interrupted="with --resume, the same command goes on from the last checkpoint",
    )
