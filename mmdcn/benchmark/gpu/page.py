"""The published page of what tools/gpu_check.py found on a GPU, and its picture."""

import json
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from mmdcn import files

from .. import BenchmarkError
from . import report

# In the order of the page.
_TIMED = (
    *("convolution", "detector", "passes", "offsets", "chunks", "product calls"),
    *("other operators", "ceilings", "counters"),
)
_CHECKED = ("accumulation", "tests", "random problems")
_SHOWN = ("environment", *_TIMED, *_CHECKED)
# What says nothing about the figures.
_PRIVATE = ("case", "mmdcn's folder", "compute-sanitizer", "ncu")
_ARITHMETICS = {"float16": "float16", "tf32": "float32 in TF32"}
_DIRECTIONS = {"forward": "forward", "forward_backward": "forward + backward"}
_CALLS = {"dense": "dense convolution", "mmdcn": "mmdcn", "torchvision": "torchvision"}
_COLORS = {"dense": "0.7", "mmdcn": "tab:blue", "torchvision": "tab:orange"}


def merge(runs: Iterable[Path]) -> dict:
    """One report of several, whose sections are the last that any of them has.

    Args:
        runs: JSON that `tools/gpu_check.py` or :func:`publish` wrote.

    Raises:
        BenchmarkError: a file is no such report, or is one of a rehearsal; or they are of different
            machines or versions.
    """
    sections, seen = {}, None
    for path in runs:
        try:
            one = json.loads(path.read_text())
            device, found = one["device"], one["sections"]
        except OSError as error:
            raise BenchmarkError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BenchmarkError(f"{path} is not what tools/gpu_check.sh writes") from error
        if device != "cuda":
            raise BenchmarkError(
                f"{path} is of a rehearsal without a GPU, whose figures mean nothing"
            )
        facts = _facts(one)
        if facts and seen and facts != seen:
            other = sorted(name for name in facts | seen if facts.get(name) != seen.get(name))
            raise BenchmarkError(f"{path} is of another machine or version: {', '.join(other)}")
        seen = facts or seen
        sections |= {name: found[name] for name in _SHOWN if name in found}
    for case in sections.get("environment", {}).get("cases", []):
        case["result"] = {n: v for n, v in case["result"].items() if n not in _PRIVATE}
    return {"part": "correct and fast", "device": "cuda", "sections": sections}


def publish(found: dict, out: Path) -> list[Path]:
    """Write a merged report as `out` with .json, .md and .png; returns their paths."""
    paths = [out.with_name(out.name + ending) for ending in (".json", ".md", ".png")]
    files.write(paths[0], json.dumps(found, indent=1) + "\n")
    files.write(paths[1], markdown(found, out.name))
    files.write_figure(paths[2], _figure(found))
    return paths


def markdown(found: dict, name: str) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in _facts(found).items())
    sections = found["sections"]
    lines = [
        "# Benchmarks on a GPU",
        "",
        f"Everything here was measured by `tools/gpu_check.sh`; the whole report is [{name}.json]"
        f"({name}.json).",
        "",
        f"On: {facts}.",
        "",
        f"![times relative to a dense convolution]({name}.png)",
        "",
        *report.tables(found, (section for section in _TIMED + _CHECKED if section in sections)),
        *report.findings(found),
    ]
    for section, entry in sections.items():
        if (missing := (entry["total"] or 0) - len(entry["cases"])) > 0:
            lines += [f"{section}: {missing} of {entry['total']} cases had no time left.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _facts(found: dict) -> dict:
    return {n: value for n, value in report.facts_of(found).items() if n not in _PRIVATE}


def _figure(found: dict) -> Figure:
    """Times relative to the dense convolution, of NCHW tensors, of the largest batch."""
    rows = [
        row
        for row in report.found_in(found, "convolution")
        if row.get("layout") == "nchw" and "forward_backward" in row.get("milliseconds", {})
    ]
    batch = max((row["batch"] for row in rows), default=0)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots(len(_DIRECTIONS), len(_ARITHMETICS), squeeze=False, sharey="row")
    for line, (direction, heading) in zip(axes, _DIRECTIONS.items()):
        for plot, (arithmetic, label) in zip(line, _ARITHMETICS.items()):
            shown = [r for r in rows if r["batch"] == batch and r["arithmetic"] == arithmetic]
            for number, call in enumerate(_CALLS):
                heights = [
                    r["milliseconds"][direction].get(call, 0)
                    / r["milliseconds"][direction]["dense"]
                    for r in shown
                ]
                places = [place + 0.27 * (number - 1) for place in range(len(shown))]
                bars = plot.bar(places, heights, 0.25, label=_CALLS[call], color=_COLORS[call])
                plot.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights])
            plot.set_xticks(range(len(shown)), [row["stage"] for row in shown])
            plot.set_title(f"{heading}, {label}, batch {batch}")
            plot.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("× dense convolution")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(_CALLS), frameon=False)
    return figure
