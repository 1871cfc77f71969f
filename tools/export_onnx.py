"""Export of a detector to ONNX, and its comparison with PyTorch in onnxruntime.

The file takes a batch of images and gives boxes, scores and labels, and masks where there are any,
in standard operators of ONNX. Batch and image size stay open. docs/deploying.md says how to run it.
"""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import launch
from mmdcn.errors import InputError

# isort: split
import argparse
import tempfile
from pathlib import Path


def image_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise InputError(f"no image {text!r}")
    return path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=launch.config_file, help="config file")
    parser.add_argument(
        "checkpoint", type=launch.checkpoint_file, help="checkpoint file or address"
    )
    parser.add_argument("-o", "--out", type=Path, required=True, help="the ONNX file to write")
    parser.add_argument(
        "--with-preprocessing",
        action="store_true",
        help="the file takes images in uint8, as OpenCV reads them, and normalises and pads them",
    )
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="write the network's layers in float16; offsets, decoding, inputs and outputs stay in "
        "float32",
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="write the network alone, up to its heads' raw outputs; a two-stage one takes boxes",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=image_file,
        metavar="FILE",
        help="images to compare on (default: some of the config's test set, or where that is not "
        "on disk, generated ones)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare: for where onnxruntime is missing, or older than 1.25.0, which is the "
        "first with DeformConv and needs Python 3.11",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="of samples for each speed (default: %(default)s)",
    )
    launch.add_config_options(parser)
    args = parser.parse_args()
    if args.out.suffix != ".onnx" or args.out.is_dir():
        parser.error(f"argument -o/--out: expected a file name ending in .onnx, got {args.out}")
    files.check_folder(args.out.parent, "-o/--out")
    if args.raw and args.with_preprocessing:
        parser.error("argument --with-preprocessing: not with --raw")
    return args


def main(args: argparse.Namespace) -> None:
    from mmdcn.engine import export

    cfg = launch.read_config(args.config, args.cfg_options)
    network = export.build(cfg, args.checkpoint, args.raw, args.with_preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        paths = args.images or export.find_images(cfg, Path(folder))
        images = list(export.load_images(cfg, network, paths))
    if not args.no_verify:
        print(f"comparing on {', '.join(path.name for path in paths)}", flush=True)
    verified = export.export(
        network,
        images,
        args.out,
        seconds=args.seconds,
        report=lambda step: print(f"{step} ...", flush=True),
        verify=not args.no_verify,
        half=args.fp16,
    )

    outputs = (
        f"{len(network.output_names)} outputs" if args.raw else ", ".join(network.output_names)
    )
    print(f"wrote {args.out}: {', '.join(network.input_names)} -> {outputs}")
    if verified is None:
        return
    print(verified.comparison)
    size = "×".join(map(str, verified.shape))
    for name, milliseconds in verified.milliseconds.items():
        print(f"{name}: {milliseconds:.0f} ms for images of {size}")


if __name__ == "__main__":
    launch.run(main, parse_args)
