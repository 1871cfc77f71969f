"""Generator of the warped-shapes data set: textured, warped shapes in COCO format, from a seed."""

import argparse
import signal
import sys
from pathlib import Path

from mmdcn.datasets.warped_shapes import CONTACT_SHEET, Parameters, generate


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
    return parser.parse_args()


def main() -> None:
    args = vars(parse_args())
    out_dir, overwrite = args.pop("out_dir"), args.pop("overwrite")
    # An exit by SystemExit removes the half-made data on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        parameters = Parameters(**args | {"strengths": tuple(args["strengths"])})
        written = generate(out_dir, parameters, overwrite)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    if written:
        print(f"wrote {out_dir}; see {out_dir / CONTACT_SHEET}")
    else:
        print(f"{out_dir} is up to date")


if __name__ == "__main__":
    main()
