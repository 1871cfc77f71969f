"""Training of Faster R-CNN plain, with DCN and with DCNv2 on warped shapes, with a report.

Everything it needs is made on the spot. What is finished is kept: run it again after an
interruption and it goes on from the last checkpoint. With other settings it asks for another
--work-dir, or for --restart.
"""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.datasets.parameters import Parameters
from mmdcn.engine import launch

# isort: split
import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

WORK_DIR, QUICK_WORK_DIR = Path("work_dirs/demo"), Path("work_dirs/demo-quick")
# What the arguments are where they are not given.
FULL = {
    "work_dir": WORK_DIR,
    "iters": None,
    "train_images": Parameters.train_images,
    "val_images": Parameters.val_images,
}
QUICK = {"work_dir": QUICK_WORK_DIR, "iters": 60, "train_images": 480, "val_images": 60}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work-dir", type=Path, help=f"(default: {WORK_DIR}, or {QUICK_WORK_DIR} with --quick)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: 0)")
    parser.add_argument("--iters", type=int, help="training iterations (default: the configs')")
    parser.add_argument("--train-images", type=int, help="(default: 2000)")
    parser.add_argument("--val-images", type=int, help="(default: 200)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the training on a third of the images, in minutes, to see it work: the "
        "figures say nothing of the models",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="delete what was made with other settings, and begin it anew",
    )
    launch.add_config_options(parser)
    args = parser.parse_args()
    if args.iters is not None and args.iters < 1:
        parser.error(f"argument --iters: must be at least 1, got {args.iters}")
    defaults = QUICK if args.quick else FULL
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    launch.begin(parse_args)  # before what follows, which takes seconds

import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint
from rich.console import Console
from rich.table import Table

from mmdcn import machine
from mmdcn.datasets import warped_shapes
from mmdcn.engine import preflight, work_folder
from mmdcn.engine.preflight import ConfigError
from mmdcn.errors import InputError, named_first_line
from mmdcn.files import write, write_figure
from mmdcn.visualization import demo_report
from mmdcn.visualization.scenes import detection_figure, large_objects_figure, load_scenes

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
MODELS = {
    "plain": "faster-rcnn_r50_fpn_demo.py",
    "DCN": "faster-rcnn_r50-dconv-c3-c4_fpn_demo.py",
    "DCNv2": "faster-rcnn_r50-mdconv-c3-c4_fpn_demo.py",
}
# What came out, in each model's folder, once it is finished.
RESULT = "result.json"

console = Console()


def main(args: argparse.Namespace) -> None:
    start = time.monotonic()
    try:
        parameters = warped_shapes.Parameters(
            seed=args.seed,
            train_images=args.train_images,
            val_images=args.val_images,
            strengths=(),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with work_folder.lock(args.work_dir):
        make_report(args, parameters)
    minutes = (time.monotonic() - start) / 60
    console.print(f"{minutes:.1f} minutes; see {args.work_dir / 'report.md'} and its pictures")


def make_report(args: argparse.Namespace, parameters: Parameters) -> None:
    """Make all that is not there yet: data, models and the report on them."""
    register_all_modules()
    configs = {name: read_config(CONFIGS / file, args) for name, file in MODELS.items()}
    folders = {name: args.work_dir / name for name in MODELS}
    for name, cfg in configs.items():
        work_folder.claim(folders[name], settings_of(cfg, parameters), RESULT, args.restart)

    console.rule("data")
    data_dir = args.work_dir / "data"
    try:
        written = warped_shapes.generate(data_dir, parameters, overwrite=True)
    except FileExistsError as error:
        raise ConfigError(str(error)) from error
    console.print(f"{data_dir} {'written' if written else 'is up to date'}")

    results = {}
    detectors = {}
    for number, (name, cfg) in enumerate(configs.items(), 1):
        console.rule(f"model {number} of {len(MODELS)}: {name}")
        results[name] = train_and_test(cfg, data_dir, folders[name], args.cfg_options)
        checkpoint = find_latest_checkpoint(str(folders[name]))
        detectors[name] = init_detector(cfg, checkpoint, device="cpu")

    console.rule("report")
    scenes = load_scenes(data_dir)
    write_figure(args.work_dir / "detections.png", detection_figure(detectors, scenes))
    deformable = {name: detectors[name] for name in detectors if name != "plain"}
    write_figure(args.work_dir / "sampling_points.png", large_objects_figure(deformable, scenes))
    report = {"models": results, "data": asdict(parameters), "quick": args.quick}
    write(args.work_dir / "report.json", json.dumps(report, indent=2))
    write(args.work_dir / "report.md", demo_report.text(report))
    print_results(results)


# Settings


def read_config(path: Path, args: argparse.Namespace) -> Config:
    """A model's config with what the arguments change in it."""
    cfg = launch.read_config(str(path), args.cfg_options)
    try:
        cfg.randomness.seed = args.seed
        if args.iters is not None:
            set_iterations(cfg, args.iters)
    except (AttributeError, KeyError, TypeError) as error:
        raise does_not_run(args.cfg_options, error) from error
    return cfg


def does_not_run(options: Sequence[str] | None, error: Exception) -> ConfigError:
    """What is said where the demo's configs stop running, because of the options that were given.

    Without options, that is no mistake of the user's, and the error goes on.
    """
    if not options:
        raise error
    given = " ".join(options)
    return ConfigError(f"--cfg-options {given}: the demo cannot run: {named_first_line(error)}")


def set_iterations(cfg: Config, iterations: int) -> None:
    """Shorten or stretch the whole schedule of a config."""
    factor = iterations / cfg.train_cfg.max_iters
    cfg.train_cfg.max_iters = iterations
    for scheduler in cfg.param_scheduler:
        scheduler.begin = round(scheduler.begin * factor)
        scheduler.end = max(scheduler.begin + 1, round(scheduler.end * factor))


def settings_of(cfg: Config, parameters: warped_shapes.Parameters) -> dict:
    """All that a model's result follows from."""
    return {
        "config": json.loads(json.dumps(cfg.to_dict(), default=str)),
        "data": warped_shapes.manifest(parameters),
        "versions": versions(),
    }


# Training


def train_and_test(
    cfg: Config, data_dir: Path, folder: Path, options: Sequence[str] | None = None
) -> dict:
    """Train and test one model in its folder, from where an earlier run stopped.

    Args:
        cfg: of the model.
        data_dir: the data set's folder.
        folder: the model's, which :func:`work_folder.claim` has made.
        options: of the command line, which are to blame if the config does not run.

    Returns:
        The figures of the report.
    """
    result = work_folder.read_json(folder / RESULT)
    if result is not None:
        console.print(f"{folder} is up to date")
        return result
    runner = None
    try:
        cfg = run_config(cfg, data_dir, folder)
        preflight.check(cfg, stages=("train", "test"))
        runner = Runner.from_cfg(cfg)
        runner.test_loop  # noqa: B018  # built now, as it may not be possible
        runner.train()
    except Exception as error:
        begun = runner is not None and "train/loss" in runner.message_hub.log_scalars
        if begun or isinstance(error, InputError):
            raise
        raise does_not_run(options, error) from error
    metrics = runner.test()
    iteration_times, _ = runner.message_hub.get_scalar("train/time").data
    lower, median, upper = np.percentile(iteration_times, (25, 50, 75)).tolist()
    result = {name: metrics[f"coco/{key}"] for name, key in demo_report.METRICS.items()}
    result |= {
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        "iterations": cfg.train_cfg.max_iters,
        "batch_size": cfg.train_dataloader.batch_size,
        "seconds_per_iteration": round(median, 4),
        "seconds_per_iteration_quartiles": [round(lower, 4), round(upper, 4)],
        "training_seconds": round(float(np.sum(iteration_times)), 1),
        "machine": machine_line(),
        "versions": versions(),
    }
    write(folder / RESULT, json.dumps(result, indent=2))
    return result


def run_config(cfg: Config, data_dir: Path, folder: Path) -> Config:
    """A model's config with its folder and its data, to go on from the last checkpoint."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(folder)
    cfg.resume = True
    # One process makes three runners: each needs logs of its own.
    cfg.visualizer.name = cfg.experiment_name = f"{folder.name}_{time.time_ns()}"
    cfg.train_dataloader.dataset.data_root = cfg.test_dataloader.dataset.data_root = str(data_dir)
    cfg.test_evaluator.ann_file = str(data_dir / "annotations" / "val.json")
    # Tested once, below: also where the earlier run stopped between the two.
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.train_cfg.pop("val_interval")
    return cfg


def machine_line() -> str:
    """Processor and number of threads."""
    facts = machine.machine(torch.device("cpu"))
    return f"{facts['cpu']}, {facts['cores']} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    return machine.versions("python", "torch", "mmengine", "mmcv", "mmdet", "mmdcn")


def print_results(models: dict[str, dict]) -> None:
    header, *rows = demo_report.table_rows(models)
    printed = Table(*header)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
    console.print(demo_report.scatter_note(models), end="")


if __name__ == "__main__":
    launch.run(
        main,
        parse_args,
        when_interrupted="run the same command again to go on from the last checkpoint",
    )
