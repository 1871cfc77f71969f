"""The arguments of the benchmark, which are read before torch is imported."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from mmdcn import files

from . import BenchmarkError, cases, values
from .arguments import (
    add_common,
    add_timing,
    common_settings,
    measure,
    program,
    timing_settings,
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Measure mmdcn against its peers on this machine: medians of calls taken in "
        "turns, as Markdown on standard output and as JSON with every sample.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_operators(commands)
    _add_family(commands)
    _add_detectors(commands)
    _add_deployment(commands)
    _add_report(commands)
    _add_gpu(commands)
    args = parser.parse_args(arguments)
    args.parser = commands.choices[args.command]
    return args


def main(arguments: list[str] | None = None) -> int:
    return run(parse_args(arguments))


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        return args.run(args)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


# ----------------------------------------------------------------------------------------- the ops


def _add_operators(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ops",
        help="the operator: forward and forward + backward, time and memory",
        description="Time the operator, forward and forward + backward, beside a dense convolution "
        "of the same shape and every peer that is installed. Lists take commas.",
    )
    parser.set_defaults(run=_run_operators)
    add_common(parser, seconds=1.0)
    parser.add_argument(
        "--shapes",
        type=values.several(values.shape),
        default=["design"],
        help=f"{', '.join(cases.SHAPES)}, or NxCxHxW (NxCxHxW:Co for other output channels); "
        "default: design",
    )
    parser.add_argument(
        "--batch",
        type=values.several(values.number(int, 1)),
        metavar="N,...",
        help="batch sizes, in place of those of the shapes",
    )
    parser.add_argument(
        "--dtype",
        type=values.several(values.one_of(*cases.DTYPES)),
        default=["float32"],
        help=f"of {', '.join(cases.DTYPES)} (default: float32); offsets and masks stay in float32 "
        "beside half precision",
    )
    parser.add_argument(
        "--versions",
        type=values.several(values.one_of(*cases.VERSIONS)),
        default=["v2"],
        help="v1: offsets, v2: offsets and mask (default: v2)",
    )
    parser.add_argument(
        "--layouts",
        type=values.several(values.one_of(*cases.LAYOUTS)),
        default=["nchw"],
        help="of nchw, channels_last (default: nchw)",
    )
    parser.add_argument(
        "--peers",
        type=values.peers,
        default=list(cases.PEERS),
        help=f"of {', '.join(cases.PEERS)}, or none (default: all); those not installed are named",
    )
    parser.add_argument("--forward-only", action="store_true", help="leave the backward pass out")
    parser.add_argument(
        "--passes",
        type=values.number(int, 1),
        default=1,
        help="go through the cases so many times, with a part of the seconds each time, so that a "
        "disturbance of the machine reaches few of a call's samples (default: %(default)s)",
    )
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="also run ours on one thread, and compare the results bit by bit",
    )


def _run_operators(args: argparse.Namespace) -> int:
    from . import operators

    settings = operators.Settings(
        cases.expand(args.shapes, args.versions, args.layouts, args.dtype, args.batch),
        peers=args.peers,
        directions=operators.DIRECTIONS[: 1 if args.forward_only else 2],
        scaling=args.scaling,
        passes=args.passes,
        **common_settings(args),
    )
    return measure(args, lambda result: operators.run(settings, result))


# --------------------------------------------------------------------------- the other operators


def _add_family(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "family",
        help="the other operators: 1-D, 3-D, DCNv3, DCNv4, RoI pooling",
        description="Time the other operators, forward and forward + backward, in float32, each "
        "beside what it replaces or its equation in plain PyTorch.",
    )
    parser.set_defaults(run=_run_family)
    add_common(parser, seconds=1.0)
    parser.add_argument(
        "--operators",
        type=values.several(values.one_of(*cases.OTHER_OPERATORS)),
        default=list(cases.OTHER_OPERATORS),
        help=f"of {', '.join(cases.OTHER_OPERATORS)} (default: all)",
    )


def _run_family(args: argparse.Namespace) -> int:
    from . import family

    settings = family.Settings(
        args.operators,
        **common_settings(args),
    )
    return measure(args, lambda result: family.run(settings, result))


# ----------------------------------------------------------------------------------- the detectors


# What is timed if nothing else is said: mmdet's sizes on a GPU, and small ones on a CPU.
_DETECTORS = tuple(
    f"configs/{folder}/faster-rcnn_r50{layers}_fpn_1x_coco.py"
    for folder, layers in (
        ("faster_rcnn", ""),
        ("dcn", "-dconv-c3-c5"),
        ("dcnv2", "-mdconv-c3-c5"),
        ("dcnv4", "-dcnv4-c3-c5"),
    )
)
_ON_GPU = {"size": (1333, 800), "batch": [1, 2, 8], "amp": True}
_ON_CPU = {"size": (320, 240), "batch": [2], "amp": False}


def _add_detectors(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "detector",
        help="whole detectors: training and inference, deformable against plain",
        description="Time whole detectors with random weights on random images, in training and at "
        "inference. Deformable ones run on our kernels and on mmcv's, in turns.",
    )
    parser.set_defaults(run=_run_detectors)
    add_common(parser, seconds=8.0)
    parser.add_argument(
        "--configs",
        type=values.config,
        nargs="+",
        metavar="CONFIG",
        help="of detectors; the others are compared with the first (default: Faster R-CNN with "
        "R-50, plain, DCN, DCNv2 and DCNv4, of this project's configs/)",
    )
    parser.add_argument(
        "--kernels",
        type=values.several(values.one_of("mmdcn", "mmcv")),
        default=["mmdcn", "mmcv"],
        help="what deformable layers run on (default: mmdcn,mmcv)",
    )
    parser.add_argument(
        "--size",
        type=values.size,
        metavar="WxH",
        help="width and height of the images (default: 320x240; on a GPU, 1333x800)",
    )
    parser.add_argument(
        "--batch",
        type=values.several(values.number(int, 1)),
        help="images at a time, one or more numbers (default: 2; on a GPU, 1,2,8)",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="in mixed precision: float16 on a GPU, where it is the default, bfloat16 on the CPU",
    )


def _run_detectors(args: argparse.Namespace) -> int:
    try:
        from . import detectors
    except ImportError as error:
        raise BenchmarkError(f"detectors need mmengine, mmcv and mmdet: {error}") from error
    common = common_settings(args)
    for name, value in (_ON_CPU if common["device"].type == "cpu" else _ON_GPU).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    settings = detectors.Settings(
        args.configs or _own_configs(_DETECTORS),
        kernels=args.kernels,
        size=args.size,
        batches=args.batch,
        amp=args.amp,
        **common,
    )
    return measure(args, lambda result: detectors.run(settings, result))


def _own_configs(names: Iterable[str]) -> list[Path]:
    paths = [Path(__file__).parents[1] / ".mim" / name for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise BenchmarkError(f"--configs: name configs of detectors, as {missing[0]} is not here")
    return paths


# ------------------------------------------------------------------------------- exported detectors


def _add_deployment(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "deploy",
        help="whole detectors as exported files, in other runtimes, against PyTorch",
        description="Time detectors with random weights on random images on the CPU: in PyTorch on "
        "our kernels, as mmdet has them, tuned (norms folded, channels-last, RoIs pooled by our "
        "operator) and compiled, and as the files that tools/export_onnx.py writes, in onnxruntime "
        "and in OpenVINO, in turns. A runtime that is not installed is left out and named.",
    )
    parser.set_defaults(run=_run_deployment)
    add_timing(parser, seconds=8.0)
    parser.add_argument(
        "--configs",
        type=values.config,
        nargs="+",
        metavar="CONFIG",
        help="of detectors (default: Faster R-CNN with R-18 and R-50, plain, DCN and DCNv2)",
    )
    parser.add_argument(
        "--runtimes",
        type=values.several(values.one_of(*cases.RUNTIMES)),
        default=list(cases.RUNTIMES),
        help=f"of {', '.join(cases.RUNTIMES)} (default: all); PyTorch as mmdet has it is always "
        "there",
    )
    parser.add_argument(
        "--size",
        type=values.size,
        default=(640, 480),
        metavar="WxH",
        help="width and height of the images (default: 640x480)",
    )
    parser.add_argument(
        "--batch",
        type=values.several(values.number(int, 1)),
        default=[1, 8],
        help="images at a time, one or more numbers (default: 1,8)",
    )
    parser.add_argument(
        "--fp16", action="store_true", help="the files' layers are in float16 (see export_onnx.py)"
    )


def _run_deployment(args: argparse.Namespace) -> int:
    try:
        from . import deployment
    except ImportError as error:
        raise BenchmarkError(
            f"exported detectors need mmengine, mmcv and mmdet: {error}"
        ) from error
    settings = deployment.Settings(
        # DCNv4's is left out: its file has the operators of DCNv2's.
        args.configs or _own_configs(_DETECTORS[:3]),
        depths=() if args.configs else (18, 50),
        runtimes=args.runtimes,
        size=args.size,
        batches=args.batch,
        half=args.fp16,
        **timing_settings(args),
    )
    return measure(args, lambda result: deployment.run(settings, result))


# -------------------------------------------------------------------------------------- the report


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="a page, a picture and README's table from what the others wrote by --json",
        description="Write a report of runs: one Markdown page, one picture, and one JSON of all. "
        "A report's JSON may stand for its runs, to make its page anew.",
    )
    parser.set_defaults(run=_run_report)
    _add_page(parser, "written by ops, family, detector or deploy")
    parser.add_argument(
        "--readme", type=Path, help="a Markdown file whose block between the markers is made anew"
    )


def _add_page(parser: argparse.ArgumentParser, runs: str) -> None:
    """Add the arguments of what makes a page of runs, which are what `runs` says."""
    parser.add_argument("runs", type=values.json_file, nargs="+", metavar="RUN.json", help=runs)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="NAME",
        help="writes NAME.json, NAME.md and NAME.png",
    )


def _run_report(args: argparse.Namespace) -> int:
    from . import report

    files.check_folder(args.out.parent, "--out")
    written = report.publish(report.load_runs(args.runs), args.out, args.readme)
    print(*written, sep="\n")
    return 0


# ---------------------------------------------------------------------------------------- on a GPU


def _add_gpu(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu",
        help="a page and a picture from what tools/gpu_check.sh found on a GPU",
        description="Write a page of what tools/gpu_check.sh found: one Markdown page, one "
        "picture, and one JSON of all. Of a section that several have, the last counts.",
    )
    parser.set_defaults(run=_run_gpu)
    _add_page(parser, "gpu_check_correct.json and gpu_check_fast.json, or a page's JSON")


def _run_gpu(args: argparse.Namespace) -> int:
    from .gpu import page

    files.check_folder(args.out.parent, "--out")
    print(*page.publish(page.merge(args.runs), args.out), sep="\n")
    return 0
