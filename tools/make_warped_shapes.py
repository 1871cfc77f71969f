"""Generator of the warped-shapes data set: textured, warped shapes in COCO format, from a seed."""

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn.datasets.parameters import Parameters
from mmdcn.engine import launch
from mmdcn.errors import InputError

# isort: split
import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    defaults = Parameters()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("out_dir", type=Path, help="the directory to make")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--train-images", type=int, default=defaults.train_images)
    parser.add_argument(
        "--val-images", type=int, default=defaults.val_images, help="in every validation set"
    )
    parser.add_argument(
        "--image-size", type=int, default=defaults.image_size, help="height and width in pixels"
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=defaults.strength,
        help="of the warps in train and val; 0 leaves the shapes undistorted",
    )
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="*",
        default=defaults.strengths,
        help="also make val_s<strength> for each: the scenes of val, warped this much",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace warped shapes made with other parameters; anything else is left alone",
    )
    given = vars(parser.parse_args())
    args = argparse.Namespace(out_dir=given.pop("out_dir"), overwrite=given.pop("overwrite"))
    try:
        args.parameters = Parameters(**given | {"strengths": tuple(given["strengths"])})
    except ValueError as error:
        raise InputError(error) from error
    return args


def main(args: argparse.Namespace) -> None:
    from mmdcn.datasets.warped_shapes import CONTACT_SHEET, generate

    try:
        written = generate(args.out_dir, args.parameters, args.overwrite)
    except FileExistsError as error:
        raise InputError(error) from error
    if written:
        print(f"wrote {args.out_dir}; see {args.out_dir / CONTACT_SHEET}")
    else:
        print(f"{args.out_dir} is up to date")


if __name__ == "__main__":
    launch.run(main, parse_args, needs_toolbox=False)
