"""The published report of runs: a page, a picture, README's table, and the JSON behind them."""

import io
import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from mmdcn.files import write
from mmdcn.markdown import table

from . import BenchmarkError
from .cases import SHAPES
from .tables import (
    DIRECTIONS,
    detector_milliseconds,
    environment_line,
    ratio,
    run_lines,
    times,
)

README_START, README_END = "<!-- benchmark -->", "<!-- /benchmark -->"

# Columns of the picture and README's table, in colours that colour-blind people can tell apart.
SHOWN = {"mmdcn": "#0072B2", "onnxruntime": "#E69F00", "mmcv": "#CC79A7"}


def write_json(path: Path, result: dict) -> None:
    """Write JSON with one line for each list of numbers or words."""
    text = json.dumps(result, indent=1)
    text = re.sub(r"\[\n[^][{}]*\]", lambda found: re.sub(r"\n *", " ", found[0]), text)
    write(path, text + "\n")


def load_runs(paths: Iterable[Path]) -> list[dict]:
    """The runs in JSON files, of single runs or of whole reports.

    Raises:
        BenchmarkError: a file is not one of these, or its run was interrupted.
    """
    runs = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found = content.get("runs", [content])
            unfinished = [run["benchmark"] for run in found if not run["complete"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BenchmarkError(
                f"{path}: expected what tools/benchmark.py ops, family, detector or deploy wrote "
                f"by --json, or a report of these; {type(error).__name__}: {error}"
            ) from error
        if unfinished:
            raise BenchmarkError(f"{path}: expected finished runs, this one was interrupted")
        runs += found
    return runs


def publish(runs: list[dict], target: Path, readme: Path | None) -> list[Path]:
    """Write the report of runs, as `target` with the endings .json, .md and .png, and in README.

    Returns:
        What was written.
    """
    page = document(runs, target.name)
    picture = figure(runs)
    block = None if readme is None else with_block(readme, runs, target)
    written = [target.with_suffix(ending) for ending in (".json", ".md")]
    write_json(written[0], {"runs": runs})
    write(written[1], page)
    if picture is not None:
        written.append(target.with_suffix(".png"))
        write(written[-1], picture)
    if block is not None:
        written.append(readme)
        write(readme, block)
    return written


def document(runs: list[dict], name: str) -> str:
    """The whole report as Markdown, beside ``name.png``."""
    device = "a GPU" if "gpu" in runs[0]["machine"] else "a CPU"
    lines = [
        f"# Benchmarks on {device}",
        "",
        "Medians of calls taken in turns in one process: ratios hold, times move with the machine. "
        "The process keeps the memory that it frees, so that no call pays for fresh pages. "
        "Deformable convolutions are 3×3 with padding 1, unless a row says otherwise; offsets in "
        "pixels ~ N(0, 2²), no bias; v1 has offsets, v2 a mask too. Backward means every gradient "
        "that there is. Before it is timed, each output is compared with the equations in plain "
        "PyTorch, and each gradient with ours. The command that made them stands above the tables; "
        f"every sample is in [{name}.json]({name}.json).",
        "",
        *itertools.chain.from_iterable((line, "") for line in _environments(runs)),
    ]
    if any(readme_rows(runs)):
        lines += [f"![times relative to a dense convolution]({name}.png)", ""]
    headings = {
        "operators": "The operator",
        "family": "The other operators",
        "detectors": "Whole detectors",
        "deployment": "Exported detectors",
    }
    for run in runs:
        lines += [
            f"## {headings[run['benchmark']]}",
            "",
            f"`{run['command']}`",
            "",
            *run_lines(run),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _environments(runs: list[dict]) -> list[str]:
    """Each machine with its versions, once."""
    return list(dict.fromkeys(environment_line(run) for run in runs))


def readme_rows(runs: list[dict]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """README's rows: a label, and for each direction how many times as long as plain it takes.

    The rows are the modulated convolutions in float32 and NCHW of the first run that has the shapes
    called `design`, and the last deformable detector of the first run of detectors.
    """
    rows = []
    names = {case.name for case in SHAPES["design"]}
    for run in runs:
        if run["benchmark"] != "operators" or rows:
            continue
        for entry in run["cases"]:
            kind = (entry["version"], entry["layout"], entry["dtype"])
            if entry["name"] in names and kind == ("v2", "nchw", "float32"):
                ratios = {
                    direction: {
                        name: value
                        for name in SHOWN
                        if (value := ratio(entry, direction, name, "dense")) is not None
                    }
                    for direction in DIRECTIONS
                }
                rows.append((entry["label"], ratios))
    detectors = [run for run in runs if run["benchmark"] == "detectors"][:1]
    for run in detectors:
        batch = run["settings"]["batches"][0]
        first, *others = [entry for entry in run["cases"] if entry["batch"] == batch]
        deformable = [entry["config"] for entry in others if entry["deformable"]]
        if not deformable:
            continue
        ratios = {direction: {} for direction in DIRECTIONS}
        for entry in others:
            if entry["config"] != deformable[-1]:
                continue
            for direction, phase in zip(DIRECTIONS, ("inference", "training")):
                taken = [detector_milliseconds(each, phase) for each in (entry, first)]
                ratios[direction][entry["kernels"]] = taken[0] / taken[1]
        rows.append((f"detector {deformable[-1]}", ratios))
    return rows


def readme_block(runs: list[dict], link: str) -> str:
    """The block of README between its markers; `link` leads to the report, without its ending."""
    rows = readme_rows(runs)
    columns = [
        (d, name) for d in DIRECTIONS for name in SHOWN if any(name in r[d] for _, r in rows)
    ]
    header = ["time relative to plain"]
    header += [f"{name}, {DIRECTIONS[direction].lower()}" for direction, name in columns]
    cells = [
        [label, *(times(ratios[direction].get(name)) for direction, name in columns)]
        for label, ratios in rows
    ]
    machine, settings = runs[0]["machine"], runs[0]["settings"]
    where = f"{machine['cpu']}, {settings['threads']} threads"
    return "\n".join(
        [
            README_START,
            f"![Time relative to a dense convolution, on {where}]({link}.png)",
            "",
            *table(header, cells),
            "",
            f"3×3, modulated, float32, on {where}; plain is torch's dense convolution of the same "
            "shape, and for the detector (inference, training iteration) the same one without "
            "deformable layers. Medians of calls taken in turns. "
            f"[More, with every setting and version]({link}.md); `make benchmark` measures it on "
            "your machine.",
            README_END,
        ]
    )


def with_block(readme: Path, runs: list[dict], target: Path) -> str:
    """README's text with its block made anew.

    Raises:
        BenchmarkError: it has no place for the block, or there is nothing to put there.
    """
    try:
        content = readme.read_text()
    except OSError as error:
        raise BenchmarkError(f"--readme: cannot read {readme}: {error}") from error
    before, start, rest = content.partition(README_START)
    _, end, after = rest.partition(README_END)
    if not start or not end:
        raise BenchmarkError(
            f"--readme: expected {README_START} and then {README_END} in {readme}, found "
            f"{'only the first' if start else 'neither'}"
        )
    if not readme_rows(runs):
        raise BenchmarkError(
            "--readme: expected a run with --shapes design in float32, or one of detectors, "
            "among what is reported"
        )
    link = Path(os.path.relpath(target, readme.parent)).as_posix()
    return before + readme_block(runs, link) + after


def figure(runs: list[dict]) -> bytes | None:
    """A picture of what README shows, as PNG; None where there is nothing to show."""
    rows = readme_rows(runs)
    if not rows:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    picture = Figure(figsize=(9.6, 4.2), layout="constrained")
    axes = picture.subplots(1, 2, sharey=True)
    labels = [textwrap.fill(label.replace("_", " "), 16) for label, _ in rows]
    for ax, (direction, heading) in zip(axes, DIRECTIONS.items()):
        names = [name for name in SHOWN if any(name in ratios[direction] for _, ratios in rows)]
        width = 0.84 / max(1, len(names))
        for number, name in enumerate(names):
            shift = (number - (len(names) - 1) / 2) * width
            shown = [
                (place + shift, ratios[direction][name])
                for place, (_, ratios) in enumerate(rows)
                if name in ratios[direction]
            ]
            # The bars start at plain convolution's 1, and go down where ours is faster.
            places, heights = zip(*((place, value - 1) for place, value in shown))
            ax.bar(places, heights, width, bottom=1, color=SHOWN[name], label=name)
            for place, value in shown:
                where = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
                said = f"{value:.1f}×" if value < 10 else times(value)
                ax.annotate(said, (place, max(value, 1)), fontsize=7, **where)
        ax.axhline(1, color="0.2", linewidth=1)
        ax.set_title(heading, fontsize=10)
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(axis="y", labelsize=8)
        ax.set_xticks(range(len(rows)), labels, fontsize=7)
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.08)
    axes[0].set_ylabel("time ÷ plain convolution (log scale, lower is better)", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    machine, settings = runs[0]["machine"], runs[0]["settings"]
    picture.suptitle(
        "Modulated deformable convolution, 3×3, float32, against plain convolution\n"
        f"{machine['cpu']}, {settings['threads']} threads",
        fontsize=10,
    )
    buffer = io.BytesIO()
    # The version of matplotlib is left out, so that the same figures give the same file.
    picture.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
