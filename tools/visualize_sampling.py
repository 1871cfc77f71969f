"""Views of what a detector's deformable layers sample: a picture, and a page to explore."""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import environment, launch
from mmdcn.errors import InputError

# isort: split
import argparse
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise argparse.ArgumentTypeError(f"expected X,Y in pixels, such as 20,30.5, got {text!r}")
    return x, y


def check_points(points: list[tuple[float, float]], image: np.ndarray) -> None:
    height, width = image.shape[:2]
    outside = [p for p in points if not (0 <= p[0] <= width and 0 <= p[1] <= height)]
    if outside:
        raise InputError(f"--points: expected x up to {width} and y to {height}, got {outside}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=launch.config_file, help="config file")
    parser.add_argument(
        "checkpoint", type=launch.checkpoint_file, help="checkpoint file or address"
    )
    parser.add_argument("image", help="image file")
    parser.add_argument(
        "--points",
        nargs="+",
        type=point,
        metavar="X,Y",
        help="in pixels of the image (default: the centres of what is detected)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="one to three deformable layers, each the input of the next, or modules that compute "
        "their own offsets; NAME#2 is the second call of NAME (default: the last three of the "
        "backbone, or one of the neck or head where the backbone has none)",
    )
    parser.add_argument("--min-score", type=float, default=0.3, help="of detections (default: 0.3)")
    parser.add_argument(
        "--max-objects", type=int, default=4, help="how many detections (default: 4)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the picture, a .png; the page is beside it, a .html (default: sampling_<image>.png)",
    )
    parser.add_argument(
        "--device", type=environment.device_name, default="cpu", help="(default: %(default)s)"
    )
    launch.add_config_options(parser)
    # Only training and testing ask for these.
    parser.set_defaults(launcher="none", work_dir=None, local_rank=0)
    args = parser.parse_args()
    if args.layers is not None and len(args.layers) > 3:
        parser.error(f"argument --layers: expected one to three, got {len(args.layers)}")
    if args.max_objects < 1:
        parser.error(f"argument --max-objects: expected at least 1, got {args.max_objects}")
    if math.isnan(args.min_score):
        parser.error("argument --min-score: expected a number, got nan")
    if args.out is None:
        args.out = Path(f"sampling_{Path(args.image).stem}.png")
    if args.out.suffix != ".png":
        parser.error(f"argument --out: expected a name ending in .png, got {args.out}")
    files.check_folder(args.out.parent, "--out")
    image = files.read_image(args.image)
    if image is None:
        raise InputError(f"image: expected an image file, got {args.image!r}")
    check_points(args.points or [], image)
    return args


def main(args: argparse.Namespace) -> None:
    from mmdet.apis import init_detector

    from mmdcn.engine.preflight import ConfigError, check_weights
    from mmdcn.files import write, write_figure
    from mmdcn.visualization import (
        check_layers,
        choose_layers,
        object_centers,
        sample_image,
        sampling_figure,
        sampling_page,
    )

    environment.check_device(args.device)
    cfg = launch.load_config(args)
    check_weights(cfg, args.checkpoint)
    model = init_detector(cfg, args.checkpoint, device=args.device, cfg_options={})
    try:
        check_layers(model, args.layers or [])
        sampled = sample_image(model, args.image)
        layers = choose_layers(sampled, args.layers)
    except ValueError as error:
        # An argument of the function is one of the tool.
        raise ConfigError(re.sub("^layers:", "--layers:", str(error))) from error
    points = args.points
    if points is None:
        points = object_centers(sampled.instances, args.min_score, args.max_objects)
    if not points:
        raise ConfigError(
            f"nothing was detected with a score of {args.min_score}: lower --min-score, or give "
            "--points"
        )
    page = args.out.with_suffix(".html")
    write_figure(args.out, sampling_figure(sampled, layers, points))
    write(page, sampling_page(sampled, layers, points[0]))
    print(f"wrote {args.out} and {page}")


if __name__ == "__main__":
    launch.run(main, parse_args)
