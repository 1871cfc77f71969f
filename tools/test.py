"""Evaluation of a trained detector: metrics of the config's test set, predictions, pictures.

A file of tools/export_onnx.py is evaluated like a checkpoint, with --against beside one.
"""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import environment, launch

# isort: split
import argparse
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=launch.config_file, help="config file")
    parser.add_argument(
        "checkpoint",
        type=launch.checkpoint_file,
        help="checkpoint file or address, or an exported file: .onnx, or OpenVINO's .xml",
    )
    parser.add_argument(
        "--work-dir", help="folder for logs and metrics (default: work_dirs/<name of the config>)"
    )
    parser.add_argument(
        "--against",
        type=launch.checkpoint_file,
        metavar="CHECKPOINT",
        help="of an exported file: evaluate this checkpoint in PyTorch too, and print the metrics "
        "and speeds of both",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="of samples for each speed of --against (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.pkl",
        help="write the predictions to a pickle file",
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window")
    parser.add_argument(
        "--show-dir",
        help="paint the predictions into this folder, inside <work dir>/<time stamp>",
    )
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds between pictures of --show (default: 2)"
    )
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    launch.add_arguments(parser)
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith((".pkl", ".pickle")):
        parser.error(f"argument --out: expected a name ending in .pkl or .pickle, got {args.out}")
    if not 0 <= args.wait_time < float("inf"):
        parser.error(f"argument --wait-time: expected at least 0 seconds, got {args.wait_time}")
    if args.show:
        environment.check_display("--show-dir writes the pictures to files")
    # One that is not absolute is inside a folder that is made anew.
    if args.show_dir is not None and Path(args.show_dir).is_absolute():
        files.check_folder(Path(args.show_dir), "--show-dir")
    if args.work_dir is not None:
        files.check_folder(Path(args.work_dir), "--work-dir")
    if args.out is not None:
        files.check_folder(Path(args.out).parent, "--out")
    if args.against is not None and (not is_exported(args.checkpoint) or is_exported(args.against)):
        parser.error(
            "argument --against: expected a checkpoint to hold an exported file (.onnx, .xml) "
            f"against, got {args.checkpoint} against {args.against}"
        )
    if not 0 < args.seconds < float("inf"):
        parser.error(f"argument --seconds: expected more than 0 seconds, got {args.seconds}")
    if is_exported(args.checkpoint):
        if args.tta:
            parser.error("argument --tta: not with an exported file")
        if args.launcher != "none":
            parser.error("argument --launcher: an exported file is run by one process")
    return args


def is_exported(checkpoint: str) -> bool:
    """Whether what is evaluated is a file that was exported."""
    return checkpoint.endswith((".onnx", ".xml"))


def take_exported_file(cfg: Config, path: str) -> None:
    """Put a file in the place of the config's model.

    Raises:
        ConfigError: it is no file of a whole detector, or of one of other classes than the data's.
    """
    from mmengine.config import ConfigDict

    from mmdcn.deploy import evaluation
    from mmdcn.engine.preflight import class_names

    evaluation.open_and_check(path, class_names(cfg))
    preprocessor = cfg.model.get("data_preprocessor") or dict(type="DetDataPreprocessor")
    cfg.model = ConfigDict(type="ExportedDetector", file=path, data_preprocessor=preprocessor)


def hold_against(runner: Runner, metrics: dict, eager: Config, args: argparse.Namespace) -> None:
    """Evaluate the checkpoint too, and print what both give, and how fast."""
    from mmdcn.deploy import beside

    names = args.checkpoint, f"{args.against}, PyTorch"
    other = launch.build_runner(eager)
    expected = other.test()
    models = dict(zip(names, (runner.model, other.model)))
    batch = next(iter(other.test_dataloader))
    print(f"timing both in turns, on batches of {len(batch['inputs'])} ...", flush=True)
    speeds = beside.images_per_second(models, batch, args.seconds)
    print(*beside.lines(names, (metrics, expected), speeds), sep="\n")


def show_predictions(cfg: Config, args: argparse.Namespace) -> None:
    from mmdet.engine.hooks.utils import trigger_visualization_hook

    from mmdcn.engine import preflight

    if "visualization" not in cfg.get("default_hooks", {}):
        raise preflight.ConfigError(
            "--show and --show-dir: the config must have "
            "default_hooks=dict(visualization=dict(type='DetVisualizationHook'))"
        )
    trigger_visualization_hook(cfg, args)


def augment_at_test_time(cfg: Config) -> None:
    """Predict on flipped images too, unless the config says how to augment (as mmdet does)."""
    from mmengine.config import ConfigDict

    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    if "tta_model" not in cfg:
        cfg.tta_model = dict(
            type="DetTTAModel",
            tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        )
    if "tta_pipeline" not in cfg:
        flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
        meta_keys = (
            "img_id",
            "img_path",
            "ori_shape",
            "img_shape",
            "scale_factor",
            "flip",
            "flip_direction",
        )
        pack = dict(type="PackDetInputs", meta_keys=meta_keys)
        augment = dict(type="TestTimeAug", transforms=[flips, [pack]])
        cfg.tta_pipeline = [*deepcopy(dataset.pipeline[:-1]), augment]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def main(args: argparse.Namespace) -> None:
    from mmdet.evaluation import DumpDetResults
    from mmdet.utils import setup_cache_size_limit_of_dynamo

    from mmdcn.engine import preflight

    setup_cache_size_limit_of_dynamo()
    cfg = launch.load_config(args)
    cfg.load_from = args.against if is_exported(args.checkpoint) else args.checkpoint
    eager = deepcopy(cfg)
    if args.show or args.show_dir:
        show_predictions(cfg, args)
    warned = preflight.check(cfg, stages=("test",))
    if is_exported(args.checkpoint):
        take_exported_file(cfg, args.checkpoint)
        cfg.load_from = None
    if args.tta:
        augment_at_test_time(cfg)
    runner = launch.build_runner(cfg, warned)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    metrics = runner.test()
    if args.against is not None:
        hold_against(runner, metrics, eager, args)


if __name__ == "__main__":
    launch.run(main, parse_args)
