"""Detection of objects in images: pictures with what was found, and predictions as JSON.

Writes OUT_DIR/vis/IMAGE and OUT_DIR/preds/IMAGE.json, as mmdet's DetInferencer does: every
prediction with its label, score and box (left, top, right, bottom in pixels), and masks where the
detector has some.
"""

from __future__ import annotations

__arguments_first__ = True  # see mmdcn/startup.py
from mmdcn import files
from mmdcn.engine import environment, launch

# isort: split
import argparse
import sys
from pathlib import Path


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="IMAGE", help="image files, folders, or patterns as in 'a/*'"
    )
    parser.add_argument("config", type=launch.config_file, help="config file")
    parser.add_argument(
        "checkpoint", type=launch.checkpoint_file, help="checkpoint file or address"
    )
    parser.add_argument(
        "--out-dir", type=Path, default=Path("outputs"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        type=environment.device_name,
        help="such as cpu or cuda:1 (default: the best that there is)",
    )
    parser.add_argument(
        "--pred-score-thr",
        type=float,
        default=0.3,
        help="least score of what is drawn; the JSON has all (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="images at a time (default: %(default)s)"
    )
    parser.add_argument("--show", action="store_true", help="show each picture in a window")
    parser.add_argument("--no-save-vis", action="store_true", help="write no pictures")
    parser.add_argument("--no-save-pred", action="store_true", help="write no predictions")
    parser.add_argument("--print-result", action="store_true", help="print the predictions")
    parser.add_argument(
        "--palette",
        default="none",
        choices=["coco", "voc", "citys", "random", "none"],
        help="colours of the classes (default: the config's, or else the checkpoint's)",
    )
    launch.add_config_options(parser)
    args = parser.parse_args()
    if args.batch_size < 1:
        parser.error(f"argument --batch-size: expected at least 1, got {args.batch_size}")
    if not 0 <= args.pred_score_thr <= 1:
        parser.error(f"argument --pred-score-thr: expected 0 to 1, got {args.pred_score_thr}")
    if args.show:
        environment.check_display("the pictures are in OUT_DIR/vis without it")
    args.images = files.find_images(args.inputs)
    files.check_readable(args.images)
    if not (args.no_save_vis and args.no_save_pred):
        files.check_names_differ(args.images)
        files.check_folder(args.out_dir, "--out-dir")
    return args


def main(args: argparse.Namespace) -> int:
    from mmdcn.engine import inference

    if args.device is not None:
        environment.check_device(args.device)
    cfg = launch.read_config(args.config, args.cfg_options)
    inferencer = inference.build(cfg, args.checkpoint, args.device, args.palette)
    writes = {"vis": not args.no_save_vis, "preds": not args.no_save_pred}
    predicted = inference.predict(
        inferencer,
        args.images,
        args.out_dir if any(writes.values()) else None,
        args.batch_size,
        pred_score_thr=args.pred_score_thr,
        show=args.show,
        no_save_vis=args.no_save_vis,
        no_save_pred=args.no_save_pred,
        print_result=args.print_result,
    )
    if predicted.images and any(writes.values()):
        folders = [str(args.out_dir / name) for name, written in writes.items() if written]
        count = len(predicted.images)
        print(f"{count} image{'s' * (count != 1)}: wrote {' and '.join(folders)}")
    for path in predicted.unreadable:
        print(f"error: cannot read the image {path}", file=sys.stderr)
    return 1 if predicted.unreadable else 0


if __name__ == "__main__":
    launch.run(main, parse_args, when_interrupted="what was finished is written")
